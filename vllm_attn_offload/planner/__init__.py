# SPDX-License-Identifier: Apache-2.0
"""Does offloading pay: cost model, hardware catalogue, simulator, calibration."""
