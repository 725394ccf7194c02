"""``make faults``: break storage, kill servers and cut off hosts, and show that nothing is lost."""

from tests.faults import hosts, playing, registry, storage, training

scores = [suite.play() for suite in (storage, training, registry, hosts)]
playing.finish(*(sum(each) for each in zip(*scores, strict=True)))
