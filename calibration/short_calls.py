"""Many short calls of numpy or torch, by one thread at a time.

Each call on more than a few hundred values gives up the interpreter's lock and waits to have it back. Two threads that do
so at once take up to twice as long as one after the other, and keep both cores busy with it.
"""

import threading

SHORT_CALLS = threading.Lock()  # held around loops of calls that take microseconds each; never while waiting for anything
