"""Device functions shared by the Gluon kernels, and names that differ between versions of Triton."""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

# asynchronous copy of a tile from global to shared memory; the name changed in Triton 3.9
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.constexpr_function
def product_layout(columns):
    """Return the layout of a product with 64 rows per warpgroup, computed by matrix instructions `columns` wide."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@builtin
def add_out(x_, place, buffer, _semantic=None):
    """Start adding a tile in shared memory to a matrix in global memory. Concurrent additions have no fixed order."""
    # before Triton 3.9, Gluon had no function for this instruction
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, x_.handle, place, buffer.handle)
