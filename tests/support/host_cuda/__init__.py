"""CUDA on the host, in C: NVIDIA's own Python binding runs on it, and nothing of the runtime knows.

Device memory is the host's at addresses that only the device can use. Streams are queues that run as late as waits
allow. Events, captured graphs and functions of the host work; what is unordered is not looked for, which is what
`tests.support.simulated` does.

`cuda.bindings.runtime` links NVIDIA's CUDA runtime statically, and that accepts no driver but NVIDIA's: with a
`libcuda.so.1` of one's own it asks `cuGetExportTable` for undocumented tables and ends in cudaErrorInsufficientDriver.
The functions of the runtime stand in a table of the binding, `cuda.bindings._internal.runtime.__pyx_capi__`, from where
its other modules take them when they are imported. `install` puts those of this library there. So arguments, handles,
enumerations and statuses are converted by the binding's own code.

| file | holds |
|---|---|
| memory.c | allocations, and their addresses on the device |
| queues.c | streams' work, and what runs when |
| copies.c | copies, fills, functions of the host |
| streams.c | streams, events, graphs |
| device.c | the device, and the driver's functions that the runtime asks directly |
| install.py | compiles it and puts it in place |
"""
