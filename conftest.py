"""What has to be said before anything imports torch or Triton."""

import os

# Tests run in as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Without a card Triton's kernels run through its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
