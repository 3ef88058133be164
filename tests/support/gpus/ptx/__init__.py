"""An interpreter for the PTX that Triton and Gluon generate for Hopper: one program (CTA) at a time, on the CPU, in
NumPy.

It runs the compiled text itself: registers of 32 lanes per warp, warps that block on barriers, matrix products that
read shared memory through descriptors and swizzles, and tensor-memory copies of boxes that count bytes on barriers.
Whatever the hardware may do late is done as late as allowed, and what would be a race on a GPU raises a named error
(errors.py).

    parse.py        text to instructions
    lanes.py        arithmetic of 32 lanes
    memory.py       shared memory with hazard checks, global memory with bounds checks
    barriers.py     mbarriers with phases and byte counts, named barriers with thread counts
    tensor_core.py  wgmma: descriptors, swizzles, fragments
    copies.py       tensor maps, bulk copies and reductions, cp.async
    operands.py     operands of instructions
    operations.py   all other instructions by name; memory accesses and shuffles
    asynchronous.py instructions for barriers, fences, copies and products
    machine.py      warps, divergence, the scheduler
    cases.py        small calls of the project's kernels
    compile.py      compiles their launches in a separate process
    launches.py     binds a launch to its compiled kernel and runs it

Not modelled: clusters, time, the actual register allocation (setmaxnreg is ignored), races between ordinary loads and
stores of different warps beyond the order in which the scheduler happens to run them, and rounding inside a tensor
core's accumulation.
"""
