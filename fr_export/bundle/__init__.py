"""Stage 4, the bundle: what is written, where, and how it is described.

targets.py         the table of targets: what becomes of a traced graph before it gets weights
recording.py       the calibration table, learnt from a small temporary bundle
variant.py         the graphs of all models in one precision for one target
shared_base.py     whether the models can share one base, and what experts add to it
pair_variant.py    one graph for all models in one precision, and the experts' factors
adapting.py        what such a bundle keeps so that adapters can be added to it
describe.py        the files beside the graphs, and the manifest
engines.py         TensorRT-RTX engines, built with the export
staged_folder.py   a folder that appears under its name only when it is complete
disk_space.py      how much room a bundle needs
weight_traffic.py  how many bytes of weights a decoded token reads
optimum_folder.py  the files that Optimum reads beside a graph
"""
