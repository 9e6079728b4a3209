"""UNIT and MUNIT against the numbers of the released code (float64)."""
import numpy as np
import pytest
import torch
from conftest import fill, load_reference, scaled
from torch import nn

import train_munit as script
from lib.models.translation import (
    AdaptiveInstanceNorm,
    LayerNorm,
    MunitGenerator,
    UnitGenerator,
    Vgg16Features,
    build_generator,
)
from lib.runtime import Run

pytestmark = pytest.mark.usefixtures("all_cores")
INFO, DATA = load_reference("translation")
SEED, BATCH = INFO["seed"], INFO["batch"]
RUN = Run(torch.device("cpu"), 0, 1, "off")
TRAINERS = {"MUNIT": "munit", "UNIT": "unit"}
VARIANTS = [(trainer, v) for trainer, part in TRAINERS.items() for v in INFO[part]["variants"]]


def images(domain: str, iteration: int = 0) -> torch.Tensor:
    values = DATA[f"images_{domain}"][iteration * BATCH:(iteration + 1) * BATCH]
    return torch.from_numpy(values / 255 * 2 - 1)


def checksum(x: torch.Tensor) -> list[float]:
    return [x.sum().item(), x.norm().item()]


def assert_checksum(x: torch.Tensor, expected, rel: float = 1e-9, what: str = "") -> None:
    total, l2 = checksum(x.detach())
    assert l2 == pytest.approx(expected[1], rel=rel, abs=1e-15), what
    # sums cancel: on the scale of the tensor
    assert total == pytest.approx(expected[0], rel=0, abs=rel * max(x.numel() ** 0.5 * l2, 1e-12)), what


def assert_array(x: torch.Tensor, expected: np.ndarray, what: str = "") -> None:
    assert x.shape == expected.shape, what
    assert np.abs(x.detach().numpy() - expected).max() <= 1e-9 * np.abs(expected).max(), what


def filled(net: nn.Module, keys, prefix: str, checksums=None) -> nn.Module:
    """``net`` in float64 with the reference's weights; its own keys must be the reference's, in their order."""
    assert [[k, list(v.shape)] for k, v in net.state_dict().items()] == keys
    net = net.double()
    net.load_state_dict(fill(keys, SEED, prefix, checksums))
    return net


def checksums_of(part: str, prefix: str) -> dict:
    """Those that the file holds of the weights of one network."""
    return {k.removeprefix(prefix): v for k, v in INFO[part]["weight_checksums"].items() if k.startswith(prefix)}


def generator(trainer: str, domain: str) -> nn.Module:
    info = INFO[TRAINERS[trainer]]
    keys, sizes = info["keys_gen"], info["hyperparameters"]["gen"]
    net = build_generator(fill(keys, SEED, f"gen_{domain}."), sizes["activ"], sizes["pad_type"])
    return filled(net, keys, f"gen_{domain}.", checksums_of(TRAINERS[trainer], f"gen_{domain}."))


def discriminator(trainer: str, domain: str) -> nn.Module:
    info = INFO[TRAINERS[trainer]]
    sizes = info["hyperparameters"]["dis"]
    net = script.Discriminator(info["hyperparameters"][f"input_dim_{domain}"], sizes["dim"], sizes["n_layer"],
                               sizes["num_scales"], sizes["norm"], sizes["activ"], sizes["pad_type"])
    return filled(net, info["keys_dis"], f"dis_{domain}.", checksums_of(TRAINERS[trainer], f"dis_{domain}."))


@pytest.fixture(scope="module")
def vgg() -> Vgg16Features:
    return filled(Vgg16Features("caffe"), INFO["vgg"]["keys"], "vgg.", checksums_of("vgg", ""))


# --- layers and forward passes ----------------------------------------------------------------------------------------


def test_layers():
    x = torch.from_numpy(DATA["layer_x"])
    norm = filled(LayerNorm(x.shape[1]), INFO["layers"]["layer_norm_keys"], "layer.ln.")
    assert_array(norm(x), DATA["layer_ln_out"])
    adaptive = AdaptiveInstanceNorm(x.shape[1]).double()
    assert_array(adaptive(x, torch.from_numpy(DATA["layer_adain_params"])), DATA["layer_adain_out"])
    assert_array(script.Discriminator.downsample(x), DATA["layer_downsample_out"])


def forward(trainer: str) -> dict[str, torch.Tensor]:
    """Everything that one pass through all networks gives, under the reference's names."""
    gen_a, gen_b, dis = generator(trainer, "a"), generator(trainer, "b"), discriminator(trainer, "a")
    x_a, x_b = images("a"), images("b")
    out = {}
    if trainer == "MUNIT":
        s_a, s_b = torch.from_numpy(DATA["munit_styles"][0][2:]).unsqueeze(-1).unsqueeze(-1)
        out["c_a"], out["c_b"] = c_a, c_b = gen_a.encode(x_a), gen_b.encode(x_b)
        out["s_a_prime"], out["s_b_prime"] = gen_a.style(x_a), gen_b.style(x_b)
        out["adain_params_of_s_a"] = gen_a.mlp(s_a)
        out["x_a_recon"] = gen_a.decode(c_a, out["s_a_prime"])
        out["x_a_restyled_with_s_a"] = gen_a.decode(c_a, s_a)
        out["x_ba"], out["x_ab"] = x_ba, x_ab = gen_a.decode(c_b, s_a), gen_b.decode(c_a, s_b)
        out["eval_a2b_with_s_b"] = x_ab
        out["c_b_recon"], out["s_a_recon"] = gen_a.encode(x_ba), gen_a.style(x_ba)
        out["x_aba"] = gen_a.decode(gen_b.encode(x_ab), out["s_a_prime"])
        out["x_bab"] = gen_b.decode(gen_a.encode(x_ba), out["s_b_prime"])
        out["a2b_with_style_of_x_b"] = gen_b.decode(c_a, out["s_b_prime"])
    else:
        _, _, n_a, n_b, n_b_recon, n_a_recon = scaled(DATA, "unit_noise")[0]  # the first two are of the D update
        out["h_a"], out["h_b"] = h_a, h_b = gen_a.encode(x_a), gen_b.encode(x_b)
        out["x_a_recon"] = gen_a.decode(h_a + n_a)
        out["x_ba"], out["x_ab"] = x_ba, x_ab = gen_a.decode(h_b + n_b), gen_b.decode(h_a + n_a)
        out["h_b_recon"], out["h_a_recon"] = gen_a.encode(x_ba), gen_b.encode(x_ab)
        out["x_aba"] = gen_a.decode(out["h_a_recon"] + n_a_recon)
        out["x_bab"] = gen_b.decode(out["h_b_recon"] + n_b_recon)
        out["test_a2b_without_noise"] = gen_b.decode(h_a)
    for name, x in (("x_ba", x_ba), ("x_a", x_a)):
        for scale, score in enumerate(dis(x)):
            out[f"dis_a_on_{name}_scale{scale}"] = score
    return out


@pytest.mark.parametrize("trainer", TRAINERS)
def test_forward(trainer, vgg):
    part = TRAINERS[trainer]
    with torch.no_grad():
        out = forward(trainer)
    for name, expected in INFO[part]["forward_checksums"].items():
        assert_checksum(out[name], expected, what=name)
    for name in DATA.files:
        stem, _, stride = name.removeprefix(f"{part}_").partition("__")
        if name.startswith(f"{part}_") and stem in out:
            x, keep = out[stem], int(stride[1:] or 1)
            assert_array(x[:, ::keep] if stride.startswith("c") else x[..., ::keep, ::keep], DATA[name], name)

    fake = [v for k, v in out.items() if k.startswith("dis_a_on_x_ba")]
    real = [v for k, v in out.items() if k.startswith("dis_a_on_x_a_")]
    for name, expected in INFO[part]["losses_from_forward"].items():
        kind, _, what = name.partition("_")
        if kind == "vgg":
            got = script.loss_vgg(vgg, out["x_ba"], images("b"))
        elif what == "G":
            got = script.loss_gan(fake, 1.0, kind)
        else:
            got = script.loss_gan(fake, 0.0, kind) + script.loss_gan(real, 1.0, kind)
        assert got.item() == pytest.approx(expected, rel=1e-9), name


def test_adaptive_rows():
    """Which slice of the MLP's output reaches which norm, and which half is the bias."""
    gen, seen = generator("MUNIT", "a"), []
    s_a = torch.from_numpy(DATA["munit_styles"][0][2]).view(BATCH, -1, 1, 1)
    names = {m: name for name, m in gen.named_modules()}
    for module in names:
        if isinstance(module, AdaptiveInstanceNorm):
            module.register_forward_hook(lambda m, inputs, _: seen.append((names[m], inputs[1])))
    with torch.no_grad():
        gen.decode(gen.encode(images("a")), s_a)
    assert len(seen) == len(INFO["munit"]["adain"])
    for (name, row), expected in zip(seen, INFO["munit"]["adain"], strict=True):
        assert name == expected["layer"] and row.shape == (BATCH, 2 * expected["num_features"])
        bias, weight = row.chunk(2, dim=1)
        assert_checksum(bias, expected["bias"])
        assert_checksum(weight, expected["weight"])


def test_vgg(vgg):
    info, x_b = INFO["vgg"], images("b")
    assert_checksum(vgg.preprocess(x_b), info["preprocessed_x_b"])
    features = vgg(x_b)
    assert list(features.shape) == info["relu5_3_shape"]
    assert_checksum(features, info["relu5_3_of_x_b"])
    step = features.shape[1] // DATA["vgg_relu5_3_of_x_b__c64"].shape[1]
    assert_array(features[:, ::step], DATA["vgg_relu5_3_of_x_b__c64"])
    normed = nn.functional.instance_norm(features)
    assert_checksum(normed, info["instance_normed_relu5_3_of_x_b"])


def assert_outputs(ours, info) -> None:
    for x, expected in zip(ours, info, strict=True):
        assert list(x.shape) == expected["shape"]
        assert_checksum(x, expected["checksum"])
        np.testing.assert_allclose(x.flatten()[:len(expected["first"])].numpy(), expected["first"], rtol=1e-9)


def full_width(net: nn.Module, name: str) -> nn.Module:
    net = net.double()
    net.load_state_dict(fill(net, SEED, f"full.{name}."))
    assert sum(p.numel() for p in net.parameters()) == INFO["full_width"][name]["parameters"]
    return net


@torch.no_grad()
def test_full_width():
    """One pass through the networks with the defaults, which are the release's widths."""
    info, munit = INFO["full_width"], full_width(MunitGenerator(), "munit_gen")
    side = munit.stride * info["munit_gen"]["outputs"][0]["shape"][-1]
    x = images("a")[:1, :, :side, :side]
    c, s = munit.encode(x), munit.style(x)
    drawn = torch.from_numpy(DATA["munit_styles"][0][0][:1]).view(1, -1, 1, 1)
    assert_outputs([c, s, munit.decode(c, s), munit.decode(c, drawn)], info["munit_gen"]["outputs"])
    unit = full_width(UnitGenerator(), "unit_gen")
    h = unit.encode(x)
    assert_outputs([h, unit.decode(h)], info["unit_gen"]["outputs"])
    assert_outputs(full_width(script.Discriminator(), "munit_dis")(x), info["munit_dis"]["outputs"])


@torch.no_grad()
def test_size_rule():
    rule, gen, dis = INFO["size_rule"], UnitGenerator(dim=2), script.Discriminator(dim=2)
    for side, expected in rule["munit_unit_generator"].items():
        out = gen.decode(gen.encode(torch.zeros(1, 3, int(side), int(side))))
        assert out.shape[2:] == (expected, expected)
    for side, expected in rule["discriminator_munit"].items():
        assert [score.shape[-1] for score in dis(torch.zeros(1, 3, int(side), int(side)))] == expected
    least = rule["discriminator_munit_smallest_side"]
    dis(torch.zeros(1, 3, least, least))
    with pytest.raises(RuntimeError):
        dis(torch.zeros(1, 3, least - 1, least - 1))


# --- training ---------------------------------------------------------------------------------------------------------


def draws(trainer: str, iteration: int):
    """The stored random numbers of one iteration, in the order in which they are asked for."""
    stored = torch.from_numpy(DATA["munit_styles"]) if trainer == "MUNIT" else scaled(DATA, "unit_noise")
    values = iter(stored[iteration])

    def draw(shape):
        return next(values).reshape(shape)
    draw.left = values
    return draw


@pytest.mark.parametrize("trainer, variant", VARIANTS)
def test_training(trainer, variant, vgg):
    """The gradients of each term, then every iteration: rates, losses, first gradients, and the weights at the end."""
    info = INFO[TRAINERS[trainer]]
    h, golden = info["hyperparameters"], info["variants"][variant]
    known = {**h, **golden["weights"]}
    w = script.Weights(**{k: known[k] for k in script.Weights._fields if k in known})
    gan_type, vgg = h["dis"]["gan_type"], vgg if w.vgg_w > 0 else None
    gen, dis = ({d: make(trainer, d) for d in "ab"} for make in (generator, discriminator))
    named = {"gen": {f"gen_{d}.{k}": p for d, net in gen.items() for k, p in net.named_parameters()},
             "dis": {f"dis_{d}.{k}": p for d, net in dis.items() for k, p in net.named_parameters()}}
    before = {k: p.detach().clone() for part in named.values() for k, p in part.items()}

    # each weighted term alone, with the initial D
    x, draw = {d: images(d) for d in "ab"}, draws(trainer, 0)
    codes = script.METHODS[trainer].codes(gen, x)
    script.METHODS[trainer].noise_d(codes, draw)  # D's draws come first
    terms = {}
    for half in script.loss_gen(trainer, gen, dis, x, codes, draw, w, gan_type=gan_type, run=RUN, vgg=vgg):
        terms |= half
    total = sum(script.weight_of(name, w) * loss for name, loss in terms.items())
    assert total.item() == pytest.approx(golden["first_G_loss_before_any_step"], rel=1e-9)
    for name, expected in golden["first_G_gradient_norm_per_weighted_term_before_any_step"].items():
        mine = [loss for term, loss in terms.items() if script.WEIGHT_OF[term.rpartition("_")[0]] == f"{name}_w"]
        norm = 0.0
        if mine and (weight := getattr(w, f"{name}_w")):
            grads = torch.autograd.grad(weight * sum(mine), list(named["gen"].values()), retain_graph=True,
                                        allow_unused=True)
            norm = torch.stack([g.norm() for g in grads if g is not None]).norm().item()
        assert norm == pytest.approx(expected, rel=1e-9), name
    del terms, total, mine, codes

    optimizers = {part: torch.optim.Adam(params.values(), h["lr"], (h["beta1"], h["beta2"]),
                                         weight_decay=h["weight_decay"]) for part, params in named.items()}

    class Update:
        """In the place of a GuardedStep: looks at the gradients before the first step."""

        @staticmethod
        def backward(part, loss):
            loss.backward()

        @staticmethod
        def step(part):
            if iteration == 0:
                for key, expected in golden[f"first_gradients_{part[0].upper()}"].items():
                    assert_checksum(named[part][key].grad, expected, what=key)
                norm = nn.utils.get_total_norm([p.grad for p in named[part].values()]).item()
                assert norm == pytest.approx(golden[f"gradient_norm_{part[0].upper()}"], rel=1e-9)
            optimizers[part].step()
            optimizers[part].zero_grad()

    for iteration, expected in enumerate(golden["iterations"]):
        lr = script.rate(h["lr"], iteration, h["step_size"], h["gamma"])
        assert lr == expected["lr"] == expected["lr_dis"]
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = lr
        draw = draws(trainer, iteration)
        losses = script.step(trainer, gen, dis, {d: images(d, iteration) for d in "ab"}, draw, w, Update,
                             gan_type=gan_type, run=RUN, vgg=vgg)
        assert next(draw.left, None) is None  # as many as the release drew
        assert losses.keys() <= {f"loss_{name}" for name in expected["losses"]}
        for name, value in expected["losses"].items():  # those without weight are 0 there, and not computed here
            assert float(losses.get(f"loss_{name}", 0.0)) == \
                pytest.approx(value, rel=1e-6 if iteration else 1e-9, abs=1e-15), name
    after = {k: p.detach() for part in named.values() for k, p in part.items()}
    assert after.keys() == golden["after"].keys()
    for key, (total, l2, delta_l2) in golden["after"].items():
        assert_checksum(after[key], (total, l2), 1e-6, key)
        assert (after[key] - before[key]).norm().item() == pytest.approx(delta_l2, rel=1e-6), key
    unmoved = set(golden["G_parameters_with_zero_data_gradient"])
    assert unmoved == named["gen"].keys() - golden["first_gradients_G"].keys()
