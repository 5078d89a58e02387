"""What full fine-tunes lose on one base, by the bits of their factors: delta_bits.json, a table and a picture.

python -m benchmarks.delta_bits --family llama3 --out DIR                          an embedded system: half an hour on two cores
python -m benchmarks.delta_bits --router ROUTER --expert NAME=SRC … --questions 0 --out DIR      SmolLM2-135M: hours

Every row is a system whose weights are what a bundle would compute with: Q(W_router) for the router, and for an expert
Q(W_router) and what stands for its change. It is run by plain torch in fp32, so activations are not rounded, in any
row. `bits` are those of router and experts together, per weight of one model. The text is one that calibration never sees.
"""
