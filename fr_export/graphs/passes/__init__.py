"""Graph rewrites, one per file; each leaves the function of the graph as it was, `to_half` and `quantise_caches` up to rounding.

`pair_segments` makes a graph for two models at once and `segment_per_expert` one of it for all, `expert_factors` ends one,
`models_in_batch` makes one for many texts of several models, `split_head` makes two graphs of one.
"""

from fusionroute.fr_export.graphs.passes.decompose_rmsnorm import decompose_rmsnorm
from fusionroute.fr_export.graphs.passes.expert_factors import expert_factors
from fusionroute.fr_export.graphs.passes.fuse_rotary import fuse_rotary
from fusionroute.fr_export.graphs.passes.fuse_skip_norm import fuse_skip_norm
from fusionroute.fr_export.graphs.passes.models_in_batch import models_in_batch
from fusionroute.fr_export.graphs.passes.pack_qkv import pack_qkv, split_qkv
from fusionroute.fr_export.graphs.passes.pair_segments import pair_segments
from fusionroute.fr_export.graphs.passes.quantise_caches import quantise_caches
from fusionroute.fr_export.graphs.passes.remove_redundant_views import remove_redundant_views
from fusionroute.fr_export.graphs.passes.segment_per_expert import segment_per_expert
from fusionroute.fr_export.graphs.passes.slices_to_split import slices_to_split
from fusionroute.fr_export.graphs.passes.split_head import is_linear, shares_head, split_head
from fusionroute.fr_export.graphs.passes.to_half import to_half
from fusionroute.fr_export.graphs.passes.window_inputs import window_inputs

__all__ = [
    "decompose_rmsnorm",
    "expert_factors",
    "fuse_rotary",
    "fuse_skip_norm",
    "is_linear",
    "models_in_batch",
    "pack_qkv",
    "pair_segments",
    "quantise_caches",
    "remove_redundant_views",
    "segment_per_expert",
    "shares_head",
    "slices_to_split",
    "split_head",
    "split_qkv",
    "to_half",
    "window_inputs",
]
