"""Stage 4, the bundle: what is written, where, and how it is described.

targets.py         the table of targets: what a traced graph becomes before it gets weights
variant.py         the graphs of all models in one precision for one target
describe.py        the manifest of what stands in the folder
staged_folder.py   a folder that appears under its name only when it is complete
disk_space.py      how much room a bundle needs
weight_traffic.py  how many bytes of weights a decoded token reads
optimum_folder.py  what Optimum reads beside a graph
"""
