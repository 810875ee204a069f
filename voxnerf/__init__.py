"""Voxel radiance fields: fields, rays, two renderers, scenes of posed images, and training on them.

Read `field`, `rays`, `render` and `reference` first; `fused/` computes what `reference` does, much faster. `scene/`,
`images`, `pictures/` and `lens` read posed images, and `nerf` trains a field on them. `state` is what a checkpoint
holds, `likeness` measures pictures, and `capacity` knows how much fits into memory.
"""
