"""Versions of the quantizers: parts of the keys under which what they gave is cached."""

from __future__ import annotations

QUANTIZER_VERSIONS = {"rtn": 1, "hqq": 1, "awq": 1, "gptq": 3, "mcmoe": 1}
"""Quantizer -> its version. Raise it with every change of an algorithm or a constant (of `grid` and `hessian`
too) that changes codes, scales or zeros: caches would go on giving the old ones.

gptq 2: damping of 0.1 in place of 0.01; 3: of 0.3.
"""
