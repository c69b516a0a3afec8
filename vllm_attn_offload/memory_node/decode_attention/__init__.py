# SPDX-License-Identifier: Apache-2.0
"""Decode attention over paged KV blocks: one interface, one file per kernel."""
