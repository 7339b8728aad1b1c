"""Megatron-LM and NeMo's Megatron-Bridge: a scheduler with the interface of their own.

Imports neither: what it asks of Megatron-LM, it asks where that was imported already.
"""

from lrpilot.client.megatron._arguments import spec_from_args
from lrpilot.client.megatron._connection import Connection
from lrpilot.client.megatron._reporting import reporting
from lrpilot.client.megatron._scheduler import ExportRefused, OptimizerParamScheduler, connected

__all__ = [
    "Connection",
    "ExportRefused",
    "OptimizerParamScheduler",
    "connected",
    "reporting",
    "spec_from_args",
]
