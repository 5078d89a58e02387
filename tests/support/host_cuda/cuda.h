/* CUDA on the host: what its files share. Statuses and enumerations are those of driver_types.h. */

#ifndef HOST_CUDA_H
#define HOST_CUDA_H

#include <stddef.h>

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_HANDLE = 400,
    NOT_READY = 600,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

enum { HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, BY_ADDRESS };

enum { POISON = 0xFF }; /* -1 in integers, NaN in every float format */

typedef void (*HostFunction)(void *);

/* What is reached when a stream comes to it: one recording of an event. */
typedef struct Mark {
    int references, done;
    double time; /* seconds, when it was reached */
    struct Stream *stream;
} Mark;

typedef struct Event {
    Mark *mark; /* of the newest recording; NULL: none, which counts as reached */
    int destroyed;
} Event;

typedef enum { COPY, FILL, CALL, RECORD, AWAIT } Kind;

/* One entry of a stream's queue. Addresses are those of this process. */
typedef struct Work {
    Kind kind;
    char *target, *source, *staged; /* staged: the bytes of pageable memory, copied at the call */
    size_t target_pitch, source_pitch, width, rows;
    int value;
    HostFunction function;
    void *data;
    Mark *mark;
    struct Work *next;
} Work;

typedef struct Graph {
    Work *first, *last;
    int valid;
} Graph;

typedef struct Stream {
    Work *first, *last;
    Graph *captured; /* NULL: nothing is being captured */
    struct Stream *next;
} Stream;

#pragma GCC visibility push(hidden) /* these names are not for other libraries, nor theirs for this one */

/* memory.c: addresses of the device -> of this process; NULL where `size` bytes are not allocated as one. */
char *on_device(const void *address, size_t size);
char *pinned(const void *address, size_t size);

/* queues.c */
extern Stream *streams;
extern __thread Stream *captured_here; /* the stream that this thread captures */
void lock(void);
void unlock(void);
int submit(Stream *stream, Work entry);
void append(Work **first, Work **last, Work *work);
void advance(Stream *stream); /* run the first entry of a queue */
void run_towards(const Mark *mark);
void run_out(void); /* everything that is queued */
void drop(Mark *mark);
void fault(const char *what);
int invalidates(void); /* whether this thread captures, which a call that waits or allocates makes invalid */

#pragma GCC visibility pop

#define LOCKED(call)   \
    lock();            \
    int status = call; \
    unlock();          \
    return status

#endif
