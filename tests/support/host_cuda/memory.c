/* Memory: the device's is this process's, at other addresses, which nobody but the device can use. */

#include "cuda.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ALIGNMENT 256
#define ROOM ((size_t)1 << 28) /* bytes of device memory */
#define FIRST ((uintptr_t)1 << 50) /* addresses of the device are no addresses of this process */

typedef struct Allocation {
    uintptr_t device; /* of pinned memory, the address by which the device reads it */
    char *bytes;
    size_t size;
    int on_host;
    struct Allocation *next;
} Allocation;

static Allocation *allocations;
static uintptr_t next_address = FIRST;
static size_t used;

static Allocation *find(uintptr_t address, size_t size, int by_host) {
    for (Allocation *each = allocations; each; each = each->next) {
        uintptr_t start = by_host ? (uintptr_t)each->bytes : each->device;
        if ((each->on_host || !by_host) && address >= start && address + size <= start + each->size) return each;
    }
    return NULL;
}

char *on_device(const void *address, size_t size) {
    Allocation *holder = find((uintptr_t)address, size, 0);
    return holder ? holder->bytes + ((uintptr_t)address - holder->device) : NULL;
}

char *pinned(const void *address, size_t size) { return find((uintptr_t)address, size, 1) ? (char *)address : NULL; }

static int allocate(void **address, size_t size, int on_host) {
    if (invalidates()) return CAPTURE_UNSUPPORTED;
    size_t whole = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (size > ROOM || (!on_host && used + whole > ROOM)) return OUT_OF_MEMORY;
    Allocation *new = calloc(1, sizeof *new);
    void *bytes = NULL;
    if (posix_memalign(&bytes, ALIGNMENT, whole ? whole : ALIGNMENT)) return OUT_OF_MEMORY;
    memset(bytes, POISON, whole);
    *new = (Allocation){next_address, bytes, size, on_host, allocations};
    next_address += whole + 4096;
    used += on_host ? 0 : whole;
    allocations = new;
    *address = on_host ? bytes : (void *)new->device;
    return SUCCESS;
}

static int uses(const Work *work, const Allocation *memory) {
    const char *low = memory->bytes, *high = low + memory->size;
    return (work->target >= low && work->target < high) || (work->source >= low && work->source < high);
}

static int release(const void *address, int on_host) {
    if (!address) return SUCCESS;
    for (Allocation **place = &allocations; *place; place = &(*place)->next) {
        Allocation *old = *place;
        if (old->on_host != on_host || (uintptr_t)address != (on_host ? (uintptr_t)old->bytes : old->device)) continue;
        *place = old->next;
        used -= on_host ? 0 : (old->size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        for (Stream *stream = streams; stream; stream = stream->next)
            for (Work *work = stream->first; work; work = work->next)
                if (uses(work, old)) {
                    fault("memory is freed that queued work uses");
                    return SUCCESS; /* the bytes stay, for that work */
                }
        free(old->bytes);
        free(old);
        return SUCCESS;
    }
    return INVALID_VALUE;
}

int cudaMalloc(void **address, size_t size) { LOCKED(allocate(address, size, 0)); }
int cudaHostAlloc(void **address, size_t size, unsigned flags) {
    (void)flags;
    LOCKED(allocate(address, size, 1));
}
int cudaFree(void *address) { LOCKED(release(address, 0)); }
int cudaFreeHost(void *address) { LOCKED(release(address, 1)); }

int cudaHostGetDevicePointer(void **address, void *on_host, unsigned flags) {
    if (flags) return INVALID_VALUE;
    lock();
    Allocation *holder = find((uintptr_t)on_host, 1, 1);
    if (holder) *address = (void *)(holder->device + ((uintptr_t)on_host - (uintptr_t)holder->bytes));
    unlock();
    return holder ? SUCCESS : INVALID_VALUE;
}

int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    lock();
    *free_bytes = ROOM - used;
    *total = ROOM;
    unlock();
    return SUCCESS;
}
