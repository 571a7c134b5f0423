"""The promotion gate: policy, verdict, and who is champion."""
