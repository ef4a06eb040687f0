"""The text engine for known families: weights fused and packed at load, no modules in the loop."""
