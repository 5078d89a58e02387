"""Graph rewrites, one per file; each leaves the function of the graph as it was, `narrow` up to rounding."""

from fr_export.passes.drop_views import drop_views
from fr_export.passes.fuse_skip_norm import fuse_skip_norm
from fr_export.passes.narrow import narrow
from fr_export.passes.pack_qkv import pack_qkv, split_qkv
from fr_export.passes.spell_out import spell_out

__all__ = ["drop_views", "fuse_skip_norm", "narrow", "pack_qkv", "spell_out", "split_qkv"]
