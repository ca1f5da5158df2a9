"""The cut does not matter: one, two and three devices write the same tokens, sampled ones too."""

from edge_runtime import DeviceSpec, LocalCluster

PROMPT = "class Stack:\n"
CUTS = {1: [(0, 5)], 2: [(0, 3), (4, 5)], 3: [(0, 0), (1, 2), (3, 5)]}

if __name__ == "__main__":
    outputs = set()
    for count, cut in CUTS.items():
        devices = [DeviceSpec(name=f"device-{i}", memory="512MiB", threads=1) for i in range(count)]
        with LocalCluster("demo", devices=devices, split=cut) as cluster:
            result = cluster.client().generate(PROMPT, max_tokens=48, temperature=0.9, seed=11)
        print(f"{count} devices: {result.token_ids[:12]} …")
        outputs.add(result.token_ids)
    assert len(outputs) == 1, "the promise is broken: please report this"
    print("the same 48 tokens each time")
