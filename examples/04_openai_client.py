"""Any OpenAI client works: here the official one, streaming a chat."""

from openai import OpenAI

from edge_runtime import DeviceSpec, LocalCluster

MESSAGE = "def read_lines(path):"

if __name__ == "__main__":
    devices = [DeviceSpec(name=name, memory="512MiB", threads=1) for name in ("phone", "laptop")]
    with LocalCluster("demo", devices=devices, split="even") as cluster:
        client = OpenAI(base_url=f"{cluster.url}/v1", api_key=cluster.api_key)
        model = client.models.list().data[0].id
        print(f"{model} answers:")
        stream = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": MESSAGE}], max_tokens=48, seed=3, stream=True
        )
        for chunk in stream:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
