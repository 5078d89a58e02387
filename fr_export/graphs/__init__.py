"""Stage 2, graphs without weights: a Hugging Face model traced into ONNX in the dialect that a runtime reads.

trace.py           a model's config → a graph whose parameters have a shape and a name only
layer_kinds.py     which layers a trace can leave out, since they equal others
repeat_layers.py   copies of traced layers in place of those left out
graph.py           that graph, and which checkpoint tensors each initialiser is made of
dialects/          one file per dialect: what linear, norm and attention calls become
passes/            one file per rewrite of a graph
factor_arrays.py   what the inputs of a graph for a pair of models hold for one expert
fusion_graph.py    the graph that fuses router and expert logits
decoder_blocks.py  a graph cut into its decoder blocks, to run with one block's weights in memory
stages.py          a graph cut finer, also where the inputs of its weight matrices are ready
batch_dimension.py an exported graph that reads one token of several texts in a pass
source_rows.py     the values of an initialiser, read from the checkpoint
weight_store.py    content-addressed files that graphs share their weights through
weight_files.py    those files gathered in one per model
"""
