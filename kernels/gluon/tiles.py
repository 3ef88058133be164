"""What the Gluon kernels share, and the names that differ between versions of Triton."""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

# asynchronous copy of a tile from global to shared memory; the name changed in Triton 3.9
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.constexpr_function
def product_layout(columns):
    """The layout of a product with 64 rows per warpgroup, by matrix instructions of this width."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


if hasattr(tma, "async_atomic_add"):

    @gluon.jit
    def add_out(x_, place, value, buffer):
        """Add a tile to a matrix in global memory, by way of shared memory; whole tiles at once, in no fixed order."""
        # the copy before may still read the buffer
        tma.store_wait(0)
        buffer.store(value)
        fence_async_shared()
        tma.async_atomic_add(x_, place, buffer)

else:
    # Triton 3.6 has the instruction, but no name for it in Gluon; it finds a buffer by itself, and waits

    @builtin
    def add_out(x_, place, value, buffer, _semantic=None):
        """Add a tile to a matrix in global memory; whole tiles at once, in no fixed order."""
        place = _semantic._convert_to_ir_values(place, require_i64=False)
        _semantic.builder.create_descriptor_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, x_.handle, value.handle, place)
