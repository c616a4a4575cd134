"""Drawing of images: errors of a pipeline become one line."""

import pytest

from trtq.errors import ArtefactError
from trtq.pipelines.draw import conditioning_for, draw


@pytest.mark.parametrize("error", [TypeError, ValueError, RuntimeError, IndexError, AttributeError])
def test_errors_of_a_pipeline_become_one_line_with_its_name(tiny, monkeypatch, error):
    def fail(*_, **__):
        raise error("unsupported operand\nmore of it")

    conditioning = conditioning_for(tiny, 2)
    draw(tiny, conditioning, steps=2, seed=0)
    monkeypatch.setattr(tiny.model, "forward", fail)
    with pytest.raises(ArtefactError) as caught:
        draw(tiny, conditioning, steps=2, seed=0)
    name = type(tiny.pipeline).__name__
    line = f"its {name} cannot be called: {error.__name__}: unsupported operand"
    assert str(caught.value).endswith(line)
