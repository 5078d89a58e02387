"""The same model in other runtimes: one file per peer, each run as a process of its own environment. See ../peers.py."""
