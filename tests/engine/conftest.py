"""The engine's tests compare with transformers in float32, on one thread: tiny models gain nothing
from more, and several test runs share a machine."""

import torch
import transformers

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
