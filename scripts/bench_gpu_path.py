"""Makes `import endor` work from a checkout where Endor is not installed: imported first, for that effect."""

from __future__ import annotations

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent

if str(CHECKOUT) not in sys.path:
    sys.path.insert(0, str(CHECKOUT))
