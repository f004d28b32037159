"""Found by the interpreter of a host that is to have an emulated card: before all else, torch is given one."""

import ctypes
import os
import site

# behind this interpreter's own packages, so that its torch is the one that is found
for folder in os.environ["DIT_QUANT_HOST_PACKAGES"].split(os.pathsep):
    site.addsitedir(folder)
# torch asks once for the class that answers for CUDA: the library has to be there first
ctypes.CDLL(os.environ["DIT_QUANT_TORCH_CARD"], mode=ctypes.RTLD_GLOBAL)
import emulated_cuda  # noqa: E402, F401
