# SPDX-License-Identifier: Apache-2.0
"""Memory nodes that Ray places and finds; Ray carries none of their data."""
