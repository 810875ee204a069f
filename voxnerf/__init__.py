"""Voxel radiance fields: rays, fields and the readable reference renderer."""
