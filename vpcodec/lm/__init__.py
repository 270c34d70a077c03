"""Language models on the tokens of a codec: the network, its folder, and sampling.

Needs the extra `lm`.
"""

from .folder import LMFolder, load_lm, read_lm, write_lm
from .network import LanguageModel
from .sampling import continue_tokens

__all__ = ["LMFolder", "LanguageModel", "continue_tokens", "load_lm", "read_lm", "write_lm"]
