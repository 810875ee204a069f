"""The kernel of `cast.py`: the nearest triangle that each ray meets, in Warp's language for CPU and CUDA."""

# mypy: ignore-errors
# Kernels are written in the language of Warp, in which annotations are types of C.

import warp as wp

FAR = 1e6  # world units: nothing is farther away


@wp.kernel
def nearest(
    first: int,
    stride: int,
    mesh: wp.uint64,
    rays_o: wp.array(dtype=wp.vec3),
    rays_d: wp.array(dtype=wp.vec3),
    distance: wp.array(dtype=float),
    face: wp.array(dtype=int),
    weights: wp.array(dtype=wp.vec3),
):
    """Write the distance, the face and the barycentric weights of what a ray meets first; a miss leaves them."""
    i = first + stride * wp.tid()
    hit = wp.mesh_query_ray(mesh, rays_o[i], rays_d[i], FAR)
    if hit.result:
        distance[i] = hit.t
        face[i] = hit.face
        weights[i] = wp.vec3(hit.u, hit.v, 1.0 - hit.u - hit.v)
