/* Streams, events and graphs. */

#include "cuda.h"

#include <stdlib.h>

int cudaStreamCreateWithFlags(Stream **stream, unsigned flags) {
    (void)flags;
    lock();
    *stream = calloc(1, sizeof **stream);
    (*stream)->next = streams;
    streams = *stream;
    unlock();
    return SUCCESS;
}

int cudaStreamDestroy(Stream *stream) {
    lock();
    while (stream->first) advance(stream);
    for (Stream **place = &streams; *place; place = &(*place)->next)
        if (*place == stream) {
            *place = stream->next;
            break;
        }
    unlock(); /* not freed: marks may name it */
    return SUCCESS;
}

int cudaStreamSynchronize(Stream *stream) {
    lock();
    int status = invalidates() ? CAPTURE_UNSUPPORTED : SUCCESS;
    while (!status && stream->first) advance(stream);
    unlock();
    return status;
}

int cudaDeviceSynchronize(void) {
    lock();
    int status = invalidates() ? CAPTURE_UNSUPPORTED : SUCCESS;
    if (!status) run_out();
    unlock();
    return status;
}

int cudaEventCreateWithFlags(Event **event, unsigned flags) {
    (void)flags;
    *event = calloc(1, sizeof **event);
    return SUCCESS;
}

int cudaEventDestroy(Event *event) {
    lock();
    drop(event->mark);
    *event = (Event){NULL, 1}; /* not freed, so that its use is noticed */
    unlock();
    return SUCCESS;
}

static int usable(const Event *event) {
    if (event->destroyed) fault("an event is used after it was destroyed");
    return !event->destroyed;
}

int cudaEventRecord(Event *event, Stream *stream) {
    if (!usable(event)) return INVALID_HANDLE;
    lock();
    Mark *mark = calloc(1, sizeof *mark);
    *mark = (Mark){2, 0, 0, stream}; /* the event's, and the queue's */
    int status = submit(stream, (Work){.kind = RECORD, .mark = mark});
    if (status) {
        free(mark);
    } else {
        drop(event->mark);
        event->mark = mark;
    }
    unlock();
    return status;
}

int cudaStreamWaitEvent(Stream *stream, Event *event, unsigned flags) {
    if (flags) return INVALID_VALUE;
    if (!usable(event)) return INVALID_HANDLE;
    lock();
    int status = SUCCESS;
    if (event->mark) {
        status = submit(stream, (Work){.kind = AWAIT, .mark = event->mark});
        event->mark->references += !status;
    }
    unlock();
    return status;
}

int cudaEventSynchronize(Event *event) {
    if (!usable(event)) return INVALID_HANDLE;
    lock();
    int status = invalidates() ? CAPTURE_UNSUPPORTED : SUCCESS;
    if (!status && event->mark) run_towards(event->mark);
    unlock();
    return status;
}

int cudaEventQuery(Event *event) { return event->mark && !event->mark->done ? NOT_READY : SUCCESS; }

int cudaEventElapsedTime(float *milliseconds, Event *start, Event *end) {
    if (!start->mark || !end->mark) return INVALID_HANDLE;
    if (!start->mark->done || !end->mark->done) return NOT_READY;
    *milliseconds = (float)(1e3 * (end->mark->time - start->mark->time));
    return SUCCESS;
}

/* -- graphs */

int cudaStreamBeginCapture(Stream *stream, int mode) {
    (void)mode;
    lock();
    int status = !stream || stream->captured ? INVALID_VALUE : SUCCESS;
    if (!status) {
        stream->captured = calloc(1, sizeof(Graph));
        stream->captured->valid = 1;
        captured_here = stream;
    }
    unlock();
    return status;
}

int cudaStreamEndCapture(Stream *stream, Graph **graph) {
    if (!stream->captured) return INVALID_VALUE;
    lock();
    *graph = stream->captured;
    stream->captured = NULL;
    captured_here = NULL;
    int status = (*graph)->valid ? SUCCESS : CAPTURE_INVALIDATED;
    if (status) *graph = NULL;
    unlock();
    return status;
}

/* What an instance launches is a copy: the graph may be destroyed before it. */
int cudaGraphInstantiate(Graph **instance, Graph *graph, unsigned long long flags) {
    (void)flags;
    lock();
    *instance = calloc(1, sizeof **instance);
    for (Work *work = graph->first; work; work = work->next) {
        Work *twin = malloc(sizeof *twin);
        *twin = *work;
        twin->next = NULL;
        append(&(*instance)->first, &(*instance)->last, twin);
    }
    unlock();
    return SUCCESS;
}

int cudaGraphLaunch(Graph *instance, Stream *stream) {
    lock();
    int status = SUCCESS;
    for (Work *work = instance->first; work && !status; work = work->next) {
        Work copied = *work;
        copied.next = NULL;
        copied.staged = NULL; /* the instance keeps it */
        status = submit(stream, copied);
    }
    unlock();
    return status;
}

/* Memory that captured pageable bytes were staged in stays: instances name it. */
static int forget(Graph *graph) {
    lock();
    for (Work *work = graph->first, *next; work; work = next) {
        next = work->next;
        free(work);
    }
    free(graph);
    unlock();
    return SUCCESS;
}

int cudaGraphDestroy(Graph *graph) { return forget(graph); }
int cudaGraphExecDestroy(Graph *instance) { return forget(instance); }
