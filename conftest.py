"""Without a card Triton's kernels run through its interpreter, which has to be said before anything imports Triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
