# SPDX-License-Identifier: Apache-2.0
"""Channels between compute and memory nodes, for control messages and frames."""
