# SPDX-License-Identifier: Apache-2.0
"""How control messages and frames travel between compute and memory nodes."""
