"""What turns a plan into JSON and back: made once, when this is imported.

Importing pydantic and making this take longer than all else that a rank does before it reads data:
fork servers import it, so that no rank does.
"""

from __future__ import annotations

import pydantic

from ftlaunch.launcher.plan import LaunchPlan

PLAN = pydantic.TypeAdapter(LaunchPlan)
