"""What every host owes a run, whatever it is. A new host adds itself to HOSTS."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_trainer.adapters.writer import serialize
from lora_trainer.config import build
from lora_trainer.errors import OutputError
from lora_trainer.hosts.ports import Host
from lora_trainer.hosts.standalone import AloneLease, FileModels, FolderStore

# A LoRA that fits the checkpoints of both hosts.
LAYER = "lora_unet_mid_block_attentions_0_proj_in"
LORA = serialize(
    {
        f"{LAYER}.lora_down.weight": torch.ones(1, 64, 1, 1),
        f"{LAYER}.lora_up.weight": torch.ones(64, 1, 1, 1),
        f"{LAYER}.alpha": torch.tensor(1.0),
    },
    {},
)


def standalone(request, folder: Path) -> Host:
    checkpoint = request.getfixturevalue("checkpoint")
    return Host(FileModels(checkpoint, torch.device("cpu"), torch.float32), AloneLease(), FolderStore(folder, False))


def webui(request, folder: Path) -> Host:
    """As `hosts.webui.train` puts it together."""
    ui = request.getfixturevalue("fake_webui")
    config = build({"base_model": "tiny", "train_data_dir": str(folder), "output_dir": str(folder)})
    models = ui.host("loaded").LoadedModel(config, lambda event: None)
    lease = ui.host("lease").QueueLease(models.still_ours, models.give_back)
    return Host(models, lease, ui.host("store").LoraFolder(folder, False, lambda event: None))


HOSTS = [standalone, webui]


@pytest.fixture(params=HOSTS)
def host(request, tmp_path) -> Host:
    return request.param(request, tmp_path / "out")


def addresses(module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}


def test_each_borrowing_is_a_fresh_view_of_the_same_tensors(host):
    with host.lease.hold(), host.models.borrow() as first:
        unet, vae = addresses(first.unet), addresses(first.vae)
    with host.lease.hold(), host.models.borrow() as second:
        assert second.unet is not first.unet
        assert addresses(second.unet) == unet
        assert addresses(second.vae) == vae
        assert not any(
            p.requires_grad for part in (second.unet, second.vae, second.text.module) for p in part.parameters()
        )


def test_the_model_is_complete(host):
    with host.lease.hold(), host.models.borrow() as model:
        ids = model.text.tokenize("a cat")
        context = model.text.encode(ids)
        assert context.shape == (1, 77, model.unet.config.cross_attention_dim)
        assert torch.equal(context, model.text.encode(ids))
        assert model.noise.timesteps == 1000
        assert model.facts.family.name == "Stable Diffusion 1.x"
        hashes = model.facts.hashes()
        assert len(hashes.legacy) == 8
        assert len(hashes.sha256) == 64


def test_long_captions_have_more_chunks_and_weights_keep_the_mean(host):
    with host.lease.hold(), host.models.borrow() as model:
        ids = model.text.tokenize("cat " * 100)
        assert ids.shape == (2, 77)
        context = model.text.encode(ids)
        assert context.shape[1] == 154
        same = model.text.encode(ids, torch.ones(2, 77))
        torch.testing.assert_close(same, context)


def test_every_host_tokenizes_alike(request, tmp_path):
    captions = ("a cat, sitting; (very) calm [or not]", "BREAK", "", "ein Käfer — 虫", "cat " * 80)
    seen = []
    for host in HOSTS:
        made = host(request, tmp_path / host.__name__)
        with made.lease.hold(), made.models.borrow() as model:
            seen.append([model.text.tokenize(caption) for caption in captions])
    first, *others = seen
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_lease_lets_go_and_says_whether_the_model_is_still_ours(host):
    with host.lease.hold(), host.models.borrow():
        # Nobody has touched it.
        assert host.lease.hand_over() is True
    with host.lease.hold():
        pass


def test_the_store_knows_which_names_are_free_and_publishes_whole(host):
    assert host.store.free("style")
    path = host.store.publish("style.safetensors", LORA, final=True)
    assert path.read_bytes() == LORA
    assert not host.store.free("style")
    kept = host.store.publish("kept.txt", b"data", final=False)
    assert kept.read_bytes() == b"data"
    kept.with_name("blocked").write_bytes(b"")
    with pytest.raises(OutputError, match="not written"):
        host.store.publish("blocked/inside.safetensors", b"data", final=False)
    assert not [path for path in (*path.parent.iterdir(), *kept.parent.iterdir()) if path.suffix == ".tmp"]
