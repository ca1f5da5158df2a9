"""One model over three devices: who holds what, and what they say together."""

from edge_runtime import DeviceSpec, LocalCluster

PROMPT = "def fibonacci(n):\n"
DEVICES = [
    DeviceSpec(name="phone", memory="512MiB", threads=1),
    DeviceSpec(name="laptop", memory="1GiB", threads=1),
    DeviceSpec(name="mini-pc", memory="1GiB", threads=1),
]

if __name__ == "__main__":
    with LocalCluster("demo", devices=DEVICES, split="even") as cluster:
        for device in cluster.devices():
            print(f"{device['name']:8} layers {device['layers']}  {device['weight_bytes'] / 2**20:.1f} MiB")
        result = cluster.client().generate(PROMPT, max_tokens=64, temperature=0.7, seed=7)
        print(PROMPT + result.text)
        print(f"{result.timings.tokens_per_second:.0f} tokens/s, finished by {result.finish_reason!r}")
