"""A GPU made of NumPy: it runs PTX, the text that real drivers get, thread by thread, and finds
what is not seen in Numba's simulator.

`parse` reads a module, `machine` runs its kernel on all threads of some blocks at once: an instruction is an operation
on arrays with an element per thread (`alu`), threads that part ways at a branch are run apart and meet again
(`warps` has what they do together), and `memory` checks every address, and whether threads race. `driver` puts all of
it in the place of libcuda.
"""
