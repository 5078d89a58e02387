/* Copies, fills and functions of the host, queued on streams. */

#include "cuda.h"

#include <stdlib.h>
#include <string.h>

/* A copy of rows; `kind` says which ends are on the device. */
static int copy(char *target, size_t target_pitch, const char *source, size_t source_pitch, size_t width, size_t rows, int kind, Stream *stream) {
    if (width > target_pitch || width > source_pitch || kind < HOST_TO_HOST || kind > BY_ADDRESS) return INVALID_VALUE;
    size_t into = rows ? (rows - 1) * target_pitch + width : 0, out = rows ? (rows - 1) * source_pitch + width : 0;
    char *target_device = on_device(target, into), *source_device = on_device(source, out);
    int to_device = kind == BY_ADDRESS ? target_device != NULL : kind == HOST_TO_DEVICE || kind == DEVICE_TO_DEVICE;
    int from_device = kind == BY_ADDRESS ? source_device != NULL : kind == DEVICE_TO_HOST || kind == DEVICE_TO_DEVICE;
    if ((to_device && !target_device) || (from_device && !source_device)) return INVALID_VALUE;
    Work work = {.kind = COPY, .target_pitch = target_pitch, .source_pitch = source_pitch, .width = width, .rows = rows};
    work.target = to_device ? target_device : target;
    work.source = from_device ? source_device : (char *)source;
    if (!from_device && !pinned(source, out)) {
        work.staged = malloc(out);
        work.source = memcpy(work.staged, source, out);
    }
    int status = submit(stream, work);
    if (status || to_device || (stream && stream->captured)) return status;
    if (pinned(target, into)) { /* it may come at any time from now on: what the host reads before it has waited is lost */
        for (size_t row = 0; row < rows; row++) memset(target + row * target_pitch, POISON, width);
    } else {
        while (stream->first) advance(stream); /* as CUDA does for pageable memory */
    }
    return SUCCESS;
}

int cudaMemcpyAsync(void *target, const void *source, size_t size, int kind, Stream *stream) {
    LOCKED(copy(target, size, source, size, size, 1, kind, stream));
}

int cudaMemcpyPeerAsync(void *target, int to, const void *source, int from, size_t size, Stream *stream) {
    if (to || from) return INVALID_DEVICE;
    LOCKED(copy(target, size, source, size, size, 1, DEVICE_TO_DEVICE, stream));
}

int cudaMemcpy2DAsync(
    void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width, size_t rows, int kind, Stream *stream) {
    LOCKED(copy(target, target_pitch, source, source_pitch, width, rows, kind, stream));
}

int cudaMemsetAsync(void *address, int value, size_t size, Stream *stream) {
    lock();
    char *bytes = on_device(address, size);
    int status = bytes ? submit(stream, (Work){.kind = FILL, .target = bytes, .width = size, .value = value}) : INVALID_VALUE;
    unlock();
    return status;
}

int cudaLaunchHostFunc(Stream *stream, HostFunction function, void *data) {
    LOCKED(function ? submit(stream, (Work){.kind = CALL, .function = function, .data = data}) : INVALID_VALUE);
}
