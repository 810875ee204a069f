"""The method: its equations by hand, the Jacobian against an explicit one, draws, regularisers and resuming."""

import contextlib
import math

import numpy as np
import pytest
import torch
from torch import nn

import sjc as method
from adapt import make_adapter
from my import checkpoint
from my.errors import UserError
from my.script import check_finite
from my.seeds import normal
from options.sjc import SJCConfig
from rules import chained_gradient
from sjc import SJC, NotFinite, centre_depth_loss, emptiness_loss, optimise
from tiny import SIZE, Affine, config
from voxnerf.rays import pixel_rays, through


def new(adapter=None, **options):
    return SJC(config(**options), adapter or Affine())


def run(optimisation, first=0, last=None):
    for step in range(first, last or optimisation.cfg.n_steps):
        optimisation.step(step)
    return optimisation


def assert_same(a, b, same=True):
    a, b = a.field.state_dict(), b.field.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) == same


# ---------------------------------------------------------------- Eq. 15 and 16


def test_chained_gradient_by_hand():
    D, x, x_perturbed = (torch.full((1, 1, 1, 1), v) for v in (7.0, 1.0, 2.0))
    assert chained_gradient(D, x, x_perturbed, 0.5, var_red=False).item() == 10  # (7 - 2) / 0.5
    assert chained_gradient(D, x, x_perturbed, 0.5, var_red=True).item() == 12  # (7 - 1) / 0.5


def test_both_equations_agree_in_expectation():
    sigma, x = 0.7, torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(500, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_perturbed = x + sigma * torch.cat([noise, -noise])  # pairs of noise with mean zero exactly
    D = torch.tanh(x_perturbed) / 4  # varies less than what it is given, as denoisers do
    g15, g16 = (chained_gradient(D, x, x_perturbed, sigma, v) for v in (False, True))
    torch.testing.assert_close(g15.mean(0), g16.mean(0), rtol=0, atol=1e-12)
    assert g16.var(0).mean() < 0.5 * g15.var(0).mean()  # var_red earns its name


# ---------------------------------------------------------------- regularisers


def test_emptiness_by_hand():
    """Three rays, weights (0, 0.1), (0.2, 0.3) and a miss, which does not count."""
    log = torch.tensor([math.log(1 * 2), math.log(3 * 4), 0.0])
    assert emptiness_loss(log, torch.tensor([2, 2, 0])).item() == pytest.approx(math.log(1 * 2 * 3 * 4) / 4)


def test_emptiness_of_many_views_is_that_of_each():
    log, n = torch.rand(3, 5), torch.tensor([[2, 2, 0, 1, 4], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    each = [emptiness_loss(*view).item() for view in zip(log, n)]
    assert emptiness_loss(log, n).tolist() == pytest.approx(each)


def with_centre(border, centre, size=64):
    """Depths (size, size) that need a gradient: `border` round a middle of depth `centre`."""
    depth = torch.full((size, size), float(border), dtype=torch.float64)
    depth[7 : size - 7, 7 : size - 7] = centre
    return depth.requires_grad_()


@pytest.mark.parametrize(
    "centre, loss",
    [
        (0.5, -math.log(1.5)),  # nearer by 1.5
        (1.9, -math.log(0.1)),  # by NEAR, where both forms meet
        (2.0, 1 - math.log(0.1)),
        (2.3, 4 - math.log(0.1)),
    ],
)  # from there on 10 for a world unit
def test_centre_depth_by_hand(centre, loss):
    assert centre_depth_loss(with_centre(2, centre)).item() == pytest.approx(loss, abs=1e-12)


@pytest.mark.parametrize("d", [-9.0, -4.7, -1.0, -0.3, -0.1001])
def test_centre_depth_has_the_published_gradient(d):
    """Of -log(centre - border), whose value is not a number there."""
    depth = with_centre(10, 10 + d)
    inner = torch.zeros(64, 64, dtype=torch.bool)
    inner[7:57, 7:57] = True
    published = -torch.log(depth[inner].mean() - depth[~inner].mean())
    assert published.isnan()
    (theirs,), (ours,) = (torch.autograd.grad(loss, depth) for loss in (published, centre_depth_loss(depth)))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert ours[inner].sum().item() == pytest.approx(1 / abs(d), rel=1e-9)


@pytest.mark.parametrize("d", [-0.0999, -1e-6, 0.0, 1e-6, 0.1, 5.0, 1e6])
def test_centre_depth_pulls_the_centre_near_from_anywhere(d):
    depth = with_centre(10, 10 + d)
    (grad,) = torch.autograd.grad(centre_depth_loss(depth), depth)
    assert grad[7:57, 7:57].sum().item() == pytest.approx(10)


@pytest.mark.parametrize("size, border", [(64, 7), (32, 4), (100, 11), (8, 1), (4, 1)])  # 7/64 of 32 is 3.5
def test_centre_depth_border_scales(size, border):
    depth = torch.zeros(size, size, requires_grad=True)
    (grad,) = torch.autograd.grad(centre_depth_loss(depth), depth)
    centre = torch.zeros(size, size, dtype=torch.bool)
    centre[border : size - border, border : size - border] = True
    assert torch.equal(grad > 0, centre) and torch.equal(grad < 0, ~centre)


def test_centre_depth_falls_as_the_centre_comes_nearer():
    losses = []
    for centre in (1e6, 100.0, 10.0, 3.0, 2.0, 1.0, 0.0):
        depth = torch.full((64, 64), 2.0)
        depth[7:57, 7:57] = centre
        depth.requires_grad_()
        losses.append(centre_depth_loss(depth))
        (grad,) = torch.autograd.grad(losses[-1], depth)
        assert grad.isfinite().all()
    losses = torch.stack(losses)
    assert losses.isfinite().all() and (losses.diff() < 0).all()
    assert centre_depth_loss(torch.full((64, 64), -1e30)).isfinite()


def test_image_too_small_for_a_centre_is_refused():
    with pytest.raises(UserError, match="--pose.rend_hw 2: --depth_weight needs at least 3"):
        new(depth_weight=1, pose={"rend_hw": 2})
    new(pose={"rend_hw": 2})  # no such loss, no such need


def test_background_keeps_its_border_and_stretches_its_middle():
    optimisation = new(plain_bg=True)
    optimisation.backgrounds = torch.arange(5.0).expand(1, 1, 5, 5)  # columns 0 1 2 3 4

    def row(*args):
        hw, fine = args
        return optimisation.background(0, hw, fine).view(hw * fine, hw * fine)[0].tolist()

    assert row(5, 1) == [0, 1, 2, 3, 4]
    assert row(8, 1) == [0, 1, 2, 2, 2, 2, 3, 4]
    assert row(2, 1) == [0, 4]
    assert row(3, 2) == [0, 0, 1, 1, 4, 4]


def test_rays_made_ahead_are_those_of_the_cameras_drawn():
    optimisation = new(batch_views=2)
    block = optimisation.views._views.n_steps
    hw = optimisation.cfg.pose.rend_hw
    for step in (0, block - 1, block, 3):  # within blocks, across them, and back
        cameras, rays = optimisation.views.of_step(step)
        assert len(cameras) == 2 and len(rays.d) == 2 * hw * hw
        for k, (camera, drawn) in enumerate(zip(cameras, optimisation.views.draw(step))):
            assert (camera.c2w == drawn.c2w).all() and camera.view == drawn.view
            want = through(optimisation.field, *pixel_rays(hw, hw, drawn.K(hw, hw), drawn.c2w))
            for got, each in zip(rays, want):
                torch.testing.assert_close(got.unflatten(0, (2, -1))[k], each)


@pytest.mark.parametrize("n_views", [1, 2, 3])
def test_every_second_view_is_opposite_the_one_before(n_views):
    optimisation = new(batch_views=n_views, pose={"antithetic": True})
    eyes = [camera.c2w[:3, 3] for i in range(6) for camera in optimisation.views.draw(i)]
    for first, second in zip(eyes[::2], eyes[1::2]):
        assert second == pytest.approx(first * [-1, 1, -1])
    assert len({tuple(eye) for eye in eyes}) == len(eyes)
    plain = new(batch_views=n_views)
    assert (plain.views.draw(0)[0].c2w[:3, 3] == eyes[0]).all()


def test_learning_rates_fall_and_the_density_has_its_own():
    optimisation = new(lr=0.1, lr_end=0.01, density_lr=0.5, bg_lr=0.2, n_steps=5, vox={"blend_bg_texture": True})
    names = [name for name, _ in optimisation.field.named_parameters()]
    first = {"density": 0.5, "bg": 0.2, "color": 0.1, "d_scale": 0.1}
    for i, left in ((0, 1.0), (2, 0.1), (4, 0.01)):
        optimisation.step(i)
        rates = {name: group["lr"] for name, group in zip(names, optimisation.optimizer.param_groups)}
        assert rates == pytest.approx({name: first[name] * left for name in names})


def test_regulariser_schedule():
    """w E before the fraction emptiness_step of the run, then multiplier w E; the depth loss always."""
    optimisation = new(emptiness_weight=100, emptiness_multiplier=20, emptiness_step=0.5, depth_weight=7, n_steps=10)
    r = optimisation.render_views(optimisation.views.of_step(0)[1], 0)
    E, Z = emptiness_loss(r.emptiness.flatten(), r.n_samples.flatten()).item(), centre_depth_loss(r.depth).item()
    for step, factor in ((0, 1), (4, 1), (5, 20), (9, 20)):
        assert optimisation.regulariser(r, step).item() == pytest.approx(100 * factor * E + 7 * Z, rel=1e-5)


@pytest.mark.parametrize("hw, to", [((9, 9), (6, 6)), ((5, 8), (12, 4)), ((6, 6), (6, 6))])
def test_resizing_is_bilinear_and_antialiased(hw, to):
    x = torch.rand(2, 3, *hw)
    want = nn.functional.interpolate(x, to, mode="bilinear", antialias=True)
    torch.testing.assert_close(method.resize(x, to), want)


# ---------------------------------------------------------------- the Jacobian


class Renderer(nn.Module):
    """The rendering x(theta) of one camera at the denoiser's size, as a function of the parameters."""

    def __init__(self, optimisation, camera):
        super().__init__()
        self.field, self.optimisation, self.camera = optimisation.field, optimisation, camera

    def forward(self):
        return method.resize(self.optimisation.render(self.camera).color[None], (SIZE, SIZE))

    def jacobian(self):
        """J as {parameter: (3 SIZE SIZE, *shape)}."""
        names, theta = zip(*self.named_parameters())

        def x(*values):
            return torch.func.functional_call(self, dict(zip(names, values)), ()).flatten()

        J = torch.autograd.functional.jacobian(x, tuple(p.detach().clone() for p in theta))
        return dict(zip(names, J))


def score_by_hand(optimisation, x, cameras, sigma, step):
    """Eq. 15 or 16 with the affine denoiser, guided: D = x_p / 2 + c_u + s (c_c - c_u); one row a camera."""
    noise = normal(x.shape, optimisation.cfg.seed, torch.tensor([step]), "noise")[0]
    x_perturbed = x + sigma * noise
    c_c = optimisation.adapter.embed([f"{c.view} {optimisation.cfg.sd.prompt}" for c in cameras])
    c_u = optimisation.adapter.embed([""])
    D = x_perturbed / 2 + c_u + optimisation.cfg.sd.scale * (c_c - c_u)
    return (D - (x if optimisation.cfg.var_red else x_perturbed)) / sigma


def disturb(optimisation):
    """Give the densities some shape, so that nothing in the Jacobian vanishes by symmetry."""
    with torch.no_grad():
        optimisation.field.density.normal_(generator=torch.Generator().manual_seed(5)).mul_(2)
    return optimisation


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"var_red": False},
        {"pose": {"rend_hw": 9}},
        {"vox": {"model_type": "VoxRF"}},
        {"vox": {"blend_bg_texture": False}},
        {"plain_bg": True},
    ],
)
def test_step_chains_the_score_with_the_jacobian(options):
    """The gradient that the optimizer gets is -(g . J), J computed explicitly."""
    optimisation = disturb(new(**options))
    step = 3
    (camera,), sigma = optimisation.views.draw(step), optimisation.draw_sigma(step)
    renderer = Renderer(optimisation, camera)
    if optimisation.backgrounds is not None:
        index = optimisation.draw_background(step)
        renderer.forward = lambda: optimisation.render(camera, bg_index=index).color[None]
    J = renderer.jacobian()
    g = score_by_hand(optimisation, renderer().detach(), [camera], sigma, step)
    optimisation.step(step)
    for name, p in renderer.named_parameters():
        want = -torch.tensordot(g.flatten(), J[name], dims=1)
        assert want.abs().max() > 0
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_batch_views_average():
    optimisation = disturb(new(batch_views=2))
    cameras, sigma = optimisation.views.draw(0), optimisation.draw_sigma(0)
    renderers = [Renderer(optimisation, camera) for camera in cameras]
    x = torch.cat([renderer().detach() for renderer in renderers])
    g = score_by_hand(optimisation, x, cameras, sigma, 0)
    singles = [r.jacobian() for r in renderers]
    optimisation.step(0)
    assert not np.array_equal(cameras[0].c2w, cameras[1].c2w)
    for name, p in renderers[0].named_parameters():
        each = [-torch.tensordot(g[b].flatten(), singles[b][name], dims=1) for b in range(2)]
        torch.testing.assert_close(p.grad, (each[0] + each[1]) / 2, rtol=1e-4, atol=1e-5)


def test_regulariser_adds_its_own_gradient():
    plain, weighted = (disturb(new(emptiness_weight=w, depth_weight=w)) for w in (0, 5))
    (camera,) = plain.views.draw(0)
    r = weighted.render(camera)
    loss = 5 * emptiness_loss(r.emptiness.flatten(), r.n_samples.flatten()) + 5 * centre_depth_loss(r.depth)
    (want,) = torch.autograd.grad(loss, weighted.field.density)
    plain.step(0)
    weighted.step(0)
    torch.testing.assert_close(weighted.field.density.grad - plain.field.density.grad, want, rtol=1e-3, atol=1e-5)


def test_ascent_brings_the_rendering_to_the_denoised_picture():
    optimisation = new(
        n_steps=200, bg_lr=0.05, sigma_range=(500, 501)
    )  # one level: Adamax remembers the largest gradient
    optimisation.adapter._denoise = lambda x, sigma, cond: torch.full_like(x, 0.5)
    error = [(optimisation.render(camera).color - 0.5).abs().mean().item() for camera in optimisation.views.draw(0)]
    run(optimisation)
    after = [(optimisation.render(camera).color - 0.5).abs().mean().item() for camera in optimisation.views.draw(0)]
    assert after[0] < 0.3 * error[0]


# ---------------------------------------------------------------- draws


def ticks(optimisation, seeds, step):
    """The table entries (smallest first) that `step` draws under many seeds."""
    table, found = optimisation.adapter.sigmas.flip(0).tolist(), []
    for optimisation.cfg.seed in seeds:
        found.append(table.index(optimisation.draw_sigma(step)))
    return np.array(found)


def test_draw_sigma_is_uniform_over_the_published_ticks():
    drawn = ticks(new(), range(19200), 0)
    assert drawn.min() == 10 and drawn.max() == 969
    counts = np.histogram(drawn, bins=16, range=(10, 970))[0]  # 60 ticks each: 1200 expected, deviation 34
    assert abs(counts - 1200).max() < 5 * 34


def test_draw_sigma_covers_a_short_range():
    assert set(ticks(new(sigma_range=(3, 6)), range(100), 0)) == {3, 4, 5}


def test_sigma_anneals_linearly():
    optimisation = new(sigma_anneal=210, n_steps=101)
    for step, high in ((0, 970), (50, 590), (100, 210)):
        drawn = ticks(optimisation, range(1500), step)
        assert drawn.min() < 10 + high / 50 and high - high / 50 < drawn.max() < high


@pytest.mark.parametrize("schedule, at", [("linear", [969, 729, 490, 250, 10]), ("sqrt", [969, 490, 291, 138, 10])])
def test_sigma_falls_without_chance(schedule, at):
    """At 0, 1/4, 1/2, 3/4 and all of the run: 969 - 959 p, or its square root; in every seed."""
    for seed in (0, 1):
        optimisation = new(sigma_schedule=schedule, n_steps=101, seed=seed)
        found = [int(ticks(optimisation, [0], step)[0]) for step in (0, 25, 50, 75, 100)]
        assert np.abs(np.array(found) - at).max() <= 1


@pytest.mark.parametrize(
    "options, flag", [({"sigma_range": (10, 1001)}, "--sigma_range"), ({"sigma_anneal": 1500}, "--sigma_anneal")]
)
def test_sigma_range_beyond_the_table(options, flag):
    with pytest.raises(UserError, match=f"{flag} .*1000 entries"):
        new(**options).draw_sigma(0)


def test_draws_depend_on_seed_and_step_only():
    a, b, other = new(), new(n_steps=99), new(seed=1)

    def draws(optimisation, step):
        (camera,) = optimisation.views.draw(step)
        return (optimisation.draw_sigma(step), camera.fov, *camera.c2w.flatten())

    forwards = [draws(a, step) for step in range(5)]
    assert forwards == [draws(b, step) for step in reversed(range(5))][::-1]
    assert len(set(forwards)) == 5
    assert not set(forwards) & {draws(other, step) for step in range(5)}


def test_same_seed_same_field():
    first = run(new(), last=5)
    assert_same(first, run(new(), last=5))
    assert_same(first, run(new(seed=1), last=5), same=False)


def test_new_field_is_a_function_of_the_seed():
    assert_same(new(), new())
    assert_same(new(), new(seed=1), same=False)


def test_plain_backgrounds_change_from_step_to_step():
    optimisation = new(plain_bg=True)
    assert optimisation.field.bg is None
    assert {optimisation.draw_background(step) for step in range(100)} == set(range(len(optimisation.backgrounds)))
    assert optimisation.background(1, 9).shape == (81, 3)


# ---------------------------------------------------------------- checkpoints


def test_resumed_run_is_bit_for_bit_the_same(tmp_path):
    straight = run(new(emptiness_weight=10, depth_weight=1))
    run(new(emptiness_weight=10, depth_weight=1), last=3).save(tmp_path, 3)
    resumed = new(emptiness_weight=10, depth_weight=1)
    first = resumed.load(checkpoint.latest(tmp_path))
    assert first == 3
    assert_same(straight, run(resumed, first=first))
    state = [s.optimizer.state_dict()["state"] for s in (straight, resumed)]
    for i, leaf in state[0].items():
        assert all(torch.equal(torch.as_tensor(leaf[k]), torch.as_tensor(state[1][i][k])) for k in leaf)


def test_checkpoint_of_another_field_is_refused(tmp_path):
    new().save(tmp_path, 1)
    with pytest.raises(UserError, match="does not fit this model.*color is .1, 3, 4, 4, 4. there, .1, 3, 5, 5, 5"):
        new(vox={"grid_size": 5}).load(checkpoint.latest(tmp_path))


# ---------------------------------------------------------------- the loop


def test_optimise_yields_steps_and_statistics():
    steps = list(optimise(new(), first_step=2))
    assert [step for step, _ in steps] == [3, 4, 5, 6]
    assert all(set(stats) == {"sigma", "score", "regulariser", "opacity", "calls", "masked"} for _, stats in steps)
    assert all(0 <= stats["opacity"] <= 1 for _, stats in steps)


def test_statistics_by_hand():
    """Of two views: the RMS of what is chained and the mean opacity are over all their pixels."""
    optimisation = disturb(new(batch_views=2))
    cameras, sigma = optimisation.views.draw(0), optimisation.draw_sigma(0)
    rendered = [optimisation.render(camera) for camera in cameras]
    x = method.resize(torch.stack([r.color for r in rendered]), (SIZE, SIZE)).detach()
    g = score_by_hand(optimisation, x, cameras, sigma, 0) / 2  # the mean over views
    stats = optimisation.step(0)
    assert stats["sigma"] == sigma and stats["score"].item() == pytest.approx(g.square().mean().sqrt().item(), rel=1e-4)
    opacity = torch.stack([r.opacity for r in rendered]).mean().item()
    assert stats["opacity"].item() == pytest.approx(opacity, rel=1e-5) and stats["regulariser"] == 0


@pytest.mark.parametrize("renderer", ["fused", "reference"])
@pytest.mark.parametrize("broken", ["score", "regulariser", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(broken, renderer):
    """Neither the field nor the moments of the optimizer, and the next step goes on from there."""
    optimisation, untouched = (new(renderer=renderer, emptiness_weight=5) for _ in range(2))
    denoise, weight = optimisation.adapter._denoise, optimisation.cfg.emptiness_weight
    for step in range(3):
        if step == 1:
            if broken == "score":
                optimisation.adapter._denoise = lambda x, sigma, cond: x * math.nan
            elif broken == "gradient":  # of one voxel, and of nothing else
                handle = optimisation.field.color.register_hook(lambda g: g.index_fill(2, torch.tensor(1), math.nan))
            else:
                optimisation.cfg.emptiness_weight = math.inf
        before = [x.clone() for x in (*optimisation.field.parameters(), *moments(optimisation))]
        assert optimisation.step(step)["masked"] == (step == 1)
        optimisation.adapter._denoise, optimisation.cfg.emptiness_weight = denoise, weight
        if broken == "gradient" and step == 1:
            handle.remove()
        after = [*optimisation.field.parameters(), *moments(optimisation)]
        assert step == 0 or all(torch.equal(*pair) for pair in zip(before, after)) == (step == 1)
    untouched.step(0)
    for state in untouched.optimizer.state.values():
        state["step"] += 1
    untouched.step(2)
    assert_same(optimisation, untouched)


class Fragile(Affine):
    """A denoiser that breaks down at many a noise, and where `half`, only outside of float32."""

    def __init__(self, limit=1.1, half=False):
        super().__init__()
        self.limit, self.half, self.calls = limit, half, []

    def _denoise(self, x, sigma, cond):
        self.calls.append(x.clone())
        breaks = (x[0, 0, 0, 0] / sigma) > self.limit
        return x / 2 + cond + (0 if self.half == "wide" else torch.where(breaks, math.nan, 0.0))

    @property
    def is_exact(self):
        return not self.half

    @contextlib.contextmanager
    def in_float32(self):
        self.half = "wide"
        yield
        self.half = True


def fragile(limit=1.1, half=False, **options):
    """An optimisation without guidance: one call of the denoiser per attempt."""
    return new(Fragile(limit, half), sd={"scale": 1}, **options)


def test_a_step_that_was_left_out_is_tried_with_fresh_noise():
    optimisation = fragile(n_steps=35)
    taken = list(optimise(optimisation))
    bad = [step - 1 for step, stats in taken if stats["masked"]]
    retried = {step: [k - 1 for k in stats["retried"]] for step, stats in taken if "retried" in stats}
    assert len(bad) == 7 and sum(retried.values(), []) == bad and set(retried) == {20, 30, 35}
    assert optimisation.left_out.all() == []
    i, sigma = bad[0], optimisation.draw_sigma(bad[0])
    first, again = optimisation.adapter.calls[i], optimisation.adapter.calls[20]  # the first of 20 steps to be due
    noise = [normal((1, 3, SIZE, SIZE), 0, torch.tensor([i]), "noise", draw)[0] for draw in (0, 1)]
    assert not torch.equal(*noise)
    rendered = again - sigma * noise[1]
    torch.testing.assert_close(rendered, first - sigma * noise[0], atol=0.3, rtol=0)  # the same view, some steps later
    assert rendered.abs().max() < 1.5


@pytest.mark.parametrize("stop", [1, 7, 10, 13, 20, 29, 30, 34])
def test_retries_are_the_same_in_a_run_that_was_stopped(tmp_path, stop):
    whole, begun, resumed = (fragile(n_steps=35) for _ in range(3))
    list(optimise(whole))
    for step, _ in optimise(begun):
        if step == stop:
            begun.save(tmp_path, step)
            break
    list(optimise(resumed, resumed.load(checkpoint.latest(tmp_path))))
    assert_same(whole, resumed)
    unlike = new(sd={"scale": 1}, n_steps=35)
    list(optimise(unlike))
    assert_same(whole, unlike, same=False)


def test_then_in_float32_and_then_the_run_ends(capsys):
    optimisation = fragile(limit=-math.inf, half=True, n_steps=25)
    assert [stats["retried"] for _, stats in optimise(optimisation) if "retried" in stats] == [
        list(range(1, 11)),
        list(range(11, 26)),
    ]
    assert "step 1: its update is not finite with fresh noise either; it is tried in float32" in capsys.readouterr().err
    broken = fragile(limit=-math.inf, n_steps=25)
    before = {name: x.clone() for name, x in broken.field.state_dict().items()}
    with pytest.raises(
        NotFinite, match="^step 1: its update is not finite, nor is it with fresh noise and in float32$"
    ):
        list(optimise(broken))
    assert broken.n_steps_taken == 20 and broken.left_out.all() == list(range(20))
    with pytest.raises(NotFinite, match="finite, nor is it some steps later and in float32$"):  # there is no noise
        list(optimise(fragile(limit=-math.inf, n_steps=5, rule="noiseless")))
    assert all(torch.equal(x, before[name]) for name, x in broken.field.state_dict().items())


@pytest.mark.parametrize("n, at", [(35, 20), (35, 30), (35, 35)])
def test_retries_that_a_run_did_not_come_to_are_the_first_when_it_goes_on(tmp_path, n, at):
    """Also after the last step. Where they help, the run ends as if nothing had been; else at once."""
    whole, begun, resumed = (fragile(n_steps=n) for _ in range(3))
    assert {step for step, stats in optimise(whole) if "retried" in stats} == {20, 30, 35}

    def broken(late):
        if begun.n_steps_taken == at:
            raise MemoryError
        SJC.retry(begun, late)

    begun.retry = broken
    with pytest.raises(MemoryError):
        list(optimise(begun))
    assert begun.n_steps_taken == at and begun.left_out.all()
    begun.save(tmp_path, at)
    hopeless = fragile(limit=-math.inf, n_steps=n)
    with pytest.raises(NotFinite) as ended:
        list(optimise(hopeless, hopeless.load(checkpoint.latest(tmp_path))))
    assert hopeless.n_steps_taken == at and ended.value.attempt.i == begun.left_out.all()[0]
    steps = list(optimise(resumed, resumed.load(checkpoint.latest(tmp_path))))
    assert [step for step, _ in steps] == list(range(at, n + 1))
    assert steps[0] == (at, {"retried": [i + 1 for i in begun.left_out.all() if at == n or i < at - 10]})
    assert not resumed.left_out.all()
    assert_same(whole, resumed)


def moments(optimisation):
    """The tensors of the optimizer's state."""
    return [x for state in optimisation.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]


def test_wrong_channels_are_refused():
    with pytest.raises(UserError, match="--vox.c 5: this model's space has 3 channels"):
        new(vox={"c": 5})


def test_view_is_a_picture_and_a_depth():
    optimisation = new()
    (camera,) = optimisation.views.draw(0)
    picture, depth, opacity = optimisation.view(camera, subpixels=4, downscale=2)
    assert picture.shape == (2 * SIZE, 2 * SIZE, 3) and depth.shape == opacity.shape == (2 * SIZE, 2 * SIZE)
    assert picture.min() >= 0 and picture.max() <= 1
    assert optimisation.depth_range == (0.5, 2.5)  # from 1.5 away, a ball of radius 1


# ---------------------------------------------------------------- prompts


class Recorder(Affine):
    """Keeps what it was asked to embed."""

    def __init__(self):
        super().__init__()
        self.asked, self.done = [], 0

    def embed(self, prompts):
        self.asked.append(list(prompts))
        return super().embed(prompts)

    def text_done(self):
        self.done += 1


def test_prompts_are_embedded_once_a_run():
    adapter = Recorder()
    optimisation = run(new(adapter, sd={"prompt": "a pig", "negative_prompt": "fog"}, family="sd", vox={"c": 3}))
    assert adapter.done == 1 and adapter.asked == [
        ["fog"],
        ["overhead view of a pig", "front view of a pig", "side view of a pig", "backside view of a pig"],
    ]
    assert torch.equal(optimisation.uncond, adapter.embed(["fog"]))


class Short(Affine):
    """Reads texts of up to 20 characters."""

    def fitting(self, prompt, spoken):
        over = max(map(len, spoken(prompt))) - 20
        return prompt[: len(prompt) - over] if over > 0 else prompt


def test_only_words_behind_the_prompt_can_be_lost():
    long = {"sd": {"prompt": "a pig of glass"}, "family": "sd", "vox": {"c": 3}}
    told = {
        style: new(Short(), pose={"view_style": style}, **long).cond["side view of"] for style in ("suffix", "prefix")
    }
    assert torch.equal(told["suffix"], Affine().embed(["a pig, side view"]))  # room for ", overhead view"
    assert torch.equal(told["prefix"], Affine().embed(["side view of a pig of glass"]))  # its own end is lost anyway


def test_bad_words_behind_a_long_prompt_stay():
    """The model reads 20 characters, and the words of bad pictures take five of them."""
    wordless = {"view_texts": [f"{view}=" for view in ("side", "front", "backside", "overhead")]}
    options = {"family": "sd", "vox": {"c": 3}, "rule": "bridge", "bad_words": "dim", "pose": wordless}
    for prompt, kept in (("a pig", "a pig"), ("a pig of red glass", "a pig of red gl")):
        bridge = new(Short(), sd={"prompt": prompt}, **options)
        assert torch.equal(bridge.bad["side view of"], Affine().embed([f"{kept}, dim"]))
        assert torch.equal(bridge.cond["side view of"], Affine().embed([kept]))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"view_texts": ["side="]}, "a pig"),
        ({"view_style": "suffix"}, "a pig, side view"),
        ({"view_style": "none"}, "a pig"),
        ({"view_texts": ["side=the flank of"]}, "the flank of a pig"),
    ],
)
def test_how_views_are_told(options, told):
    optimisation = new(sd={"prompt": "a pig"}, pose=options, family="sd", vox={"c": 3})
    assert torch.equal(optimisation.cond["side view of"], Affine().embed([told]))


def test_perp_neg_mixes_conditions():
    """At 45 degrees: half front, half side, and both push away; overhead has no negatives, and fills the batch."""
    import pose

    optimisation = new(pose={"perp_neg": True}, family="sd", vox={"c": 3}, batch_views=2)
    cameras = [pose.camera_at(np.deg2rad(45), 1.4), pose.camera_at(0, 0.1)]
    cond, (away, weights) = optimisation.conditions(cameras)
    front, side, overhead = (optimisation.cond[f"{view} view of"] for view in ("front", "side", "overhead"))
    torch.testing.assert_close(cond, torch.cat([(front + side) / 2, overhead]))
    assert torch.equal(away, torch.stack([torch.cat([front, side]), torch.cat([overhead, overhead])]))
    assert weights.tolist() == [pytest.approx([0.6892, 0.6892], abs=1e-4), [0, 0]]
    assert optimisation.conditions(cameras[1:])[1] is None
    check_finite(optimisation.step(0), "step 1", "rest")


@pytest.mark.parametrize(
    "family, options, words",
    [
        ("ideal", {"view_style": "suffix"}, "knows views by their prefix only"),
        ("ideal", {"view_texts": ["front=x"]}, "--pose.view_texts"),
        ("sd", {"perp_neg": True, "view_style": "none"}, "--pose.perp_neg True needs view prompts"),
        ("sd", {"perp_neg": True, "view_words": "octants"}, "--pose.perp_neg True needs --pose.view_words sjc"),
        ("sd", {"view_texts": ["side=x"], "view_style": "none"}, "mean nothing with --pose.view_style none"),
        ("sd", {"view_texts": ["top=x"]}, "expected VIEW=TEXT"),
    ],
)
def test_unfit_view_options(family, options, words):
    with pytest.raises(UserError, match=words):
        config(family=family, pose=options).check_files()


# ---------------------------------------------------------------- Stable Diffusion latents


@pytest.mark.parametrize("rend_hw, options", [(8, {}), (16, {}), (6, {}), (8, {"plain_bg": True, "batch_views": 2})])
def test_latent_field_steps_with_stable_diffusion(tiny_sd, rend_hw, options):
    cfg = SJCConfig(
        sd={"checkpoint": str(tiny_sd), "prompt": "a blue duck"},
        vox={"grid_size": 6},
        pose={"rend_hw": rend_hw},
        n_steps=10,
        **options,
    )
    assert cfg.vox.model_type == "V_SD" and cfg.vox.c == 4
    optimisation = SJC(cfg, make_adapter(cfg, "cpu"))
    before = optimisation.field.color.detach().clone()
    check_finite(optimisation.step(0), "step 1", "rest")
    assert not torch.equal(optimisation.field.color, before)
    (camera,) = optimisation.views.draw(0)[:1]
    picture, depth, _ = optimisation.view(camera)
    assert picture.shape == (2 * rend_hw, 2 * rend_hw, 3) and depth.shape == (rend_hw, rend_hw)


def test_the_miniature_knows_no_punctuation():
    with pytest.raises(UserError, match="--sd.variant mini knows views by their prefix only"):
        SJCConfig(sd={"variant": "mini", "prompt": "a blue duck"}, pose={"view_style": "suffix"}).check_files()
    with pytest.raises(UserError, match="this model knows no '.'; leave that out"):
        SJCConfig(sd={"variant": "mini", "prompt": "a red house."}).check_files()
