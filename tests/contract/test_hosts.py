"""What every host owes a run, whatever it is. A new host adds itself to HOSTS."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_trainer.errors import OutputError
from lora_trainer.hosts.ports import Host
from lora_trainer.hosts.standalone import AloneLease, FileModels, FolderStore


def standalone(checkpoint: Path, folder: Path) -> Host:
    return Host(FileModels(checkpoint, torch.device("cpu"), torch.float32), AloneLease(), FolderStore(folder, False))


HOSTS = [standalone]


@pytest.fixture(params=HOSTS)
def host(request, checkpoint, tmp_path) -> Host:
    return request.param(checkpoint, tmp_path / "out")


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
    with host.models.borrow() as model:
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
    with host.models.borrow() as model:
        ids = model.text.tokenize("cat " * 100)
        assert ids.shape == (2, 77)
        context = model.text.encode(ids)
        assert context.shape[1] == 154
        same = model.text.encode(ids, torch.ones(2, 77))
        torch.testing.assert_close(same, context)


def test_the_lease_lets_go_and_says_whether_the_model_is_still_ours(host):
    with host.lease.hold():
        assert host.lease.hand_over() in (True, False)
    with host.lease.hold():
        pass


def test_the_store_claims_a_free_name_and_publishes_whole(host):
    name = host.store.claim("style")
    path = host.store.publish(f"{name}.safetensors", b"data", final=True)
    assert path.read_bytes() == b"data"
    assert host.store.claim("style") != name
    path.parent.joinpath("blocked").write_bytes(b"")
    with pytest.raises(OutputError, match="not written"):
        host.store.publish("blocked/inside.safetensors", b"data", final=False)
