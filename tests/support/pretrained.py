"""The checkpoints that $OPDLM_REAL names, and questions to ask them."""

import os
from pathlib import Path

MODELS = sorted(path.parent for path in Path(os.environ.get("OPDLM_REAL", "/nowhere")).glob("*/config.json"))
QUESTIONS = [f"What is {a} plus {b}? Explain it in one sentence." for a, b in enumerate(range(40, 72), 3)]
