/* Queues of work that run only as far as somebody waits, so that a missing wait is noticed. */

#include "cuda.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

Stream *streams;
__thread Stream *captured_here;
static pthread_mutex_t mutex;
static char faults[4096];

__attribute__((constructor)) static void begin(void) {
    pthread_mutexattr_t recursive; /* a host function may free what its owner no longer needs */
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&mutex, &recursive);
}

void lock(void) { pthread_mutex_lock(&mutex); }
void unlock(void) { pthread_mutex_unlock(&mutex); }

/* What the program did that works on a real device only by luck, a line each. For the tests, which read and clear it. */
const char *host_cuda_faults(void) { return faults; }
void host_cuda_forget(void) { faults[0] = 0; }

void fault(const char *what) {
    if (strlen(faults) + strlen(what) + 2 < sizeof faults) strcat(strcat(faults, what), "\n");
}

int invalidates(void) {
    if (captured_here) captured_here->captured->valid = 0;
    return captured_here != NULL;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

void drop(Mark *mark) {
    if (mark && !--mark->references) free(mark);
}

static void discard(Work *work) {
    drop(work->mark);
    free(work->staged);
    free(work);
}

void append(Work **first, Work **last, Work *work) {
    if (*last) (*last)->next = work;
    else *first = work;
    *last = work;
}

static void perform(const Work *work) {
    for (size_t row = 0; row < work->rows && work->kind == COPY; row++)
        memmove(work->target + row * work->target_pitch, work->source + row * work->source_pitch, work->width);
    if (work->kind == FILL) memset(work->target, work->value, work->width);
    if (work->kind == CALL) work->function(work->data);
    if (work->kind == RECORD) {
        work->mark->done = 1;
        work->mark->time = now();
    }
}

/* The first entry of a stream's queue. */
void advance(Stream *stream) {
    Work *work = stream->first;
    if (work->kind == AWAIT) run_towards(work->mark);
    stream->first = work->next;
    if (!stream->first) stream->last = NULL;
    perform(work);
    discard(work);
}

void run_towards(const Mark *mark) {
    while (!mark->done) advance(mark->stream);
}

void run_out(void) {
    for (Stream *stream = streams; stream; stream = stream->next)
        while (stream->first) advance(stream);
}

/* Queue work, or note it where the stream is being captured. */
int submit(Stream *stream, Work entry) {
    if (!stream) return INVALID_HANDLE; /* the default stream, which the runtime must not use */
    if (stream->captured && (entry.kind == RECORD || entry.kind == AWAIT)) return CAPTURE_UNSUPPORTED;
    Work *work = malloc(sizeof *work);
    *work = entry;
    if (stream->captured) append(&stream->captured->first, &stream->captured->last, work);
    else append(&stream->first, &stream->last, work);
    return SUCCESS;
}
