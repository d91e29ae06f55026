"""A client of `aiotrt serve` that knows what every answer must be, and counts those that are not."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import aiohttp
import grpc
import numpy as np
import onnxruntime

from aiotrt.serving.kserve.messages import messages
from benchmarks.serving_model import WIDTH, crops

__all__ = ["Answer", "Asker", "GrpcAsker"]

CROPS: Final = 64  # different ones
PATIENCE: Final = 30.0  # seconds, after which a request is lost
_LENGTH: Final = "Inference-Header-Content-Length"
#: HTTP's, by gRPC's; others are 500.
_STATUS: Final = {grpc.StatusCode.UNAVAILABLE: 503, grpc.StatusCode.DEADLINE_EXCEEDED: 504}


@dataclass(frozen=True)
class Answer:
    """One request's end.

    Attributes:
        status: of the answer; 0 if none came.
        began: seconds of the monotonic clock.
        seconds: from the first byte sent to the last received.
        retry_after: what a 503 says.
    """

    status: int
    began: float
    seconds: float
    retry_after: str | None = None


class Asker:
    """Asks a `benchmarks.serving_model.reader`.

    Args:
        url: the server's.
        file: the model, which is asked directly for what is right.

    Attributes:
        sent: how many requests.
        wrong: answers that are not what they must be, and requests without any, by what is wrong.
    """

    def __init__(self, url: str, file: Path) -> None:
        self.sent = 0
        self.wrong: Counter[str] = Counter()
        self._url = f"{url}/v2/models/{file.stem}/infer"
        self._session: aiohttp.ClientSession | None = None
        self._answered: set[str] = set()
        self._crops = crops(CROPS, WIDTH, np.random.default_rng(1))
        self._sums = [int(crop.astype(np.int64).sum()) for crop in self._crops]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        number = np.zeros(1, np.int64)
        self._letters = [
            session.run(["letters"], {"pixels": crop[None], "number": number})[0][0].tolist() for crop in self._crops
        ]

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=PATIENCE)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def ask(self, deadline: float | None = None) -> Answer:
        """One request, of a number that no other has; `deadline` in seconds."""
        number, self.sent = self.sent, self.sent + 1
        began = time.monotonic()
        try:
            status, wait, outputs = await self._send(number, deadline)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.wrong[f"lost: {type(error).__name__}"] += 1
            return Answer(0, began, time.monotonic() - began)
        seconds = time.monotonic() - began
        if status == 200:
            self._check(number, *outputs)
        return Answer(status, began, seconds, wait)

    async def _send(self, number: int, deadline: float | None) -> tuple[int, str | None, tuple[str, list[int], list[int]]]:
        """Status, when to come back, and of a good answer its id, checksum and letters."""
        assert self._session is not None
        crop = self._crops[number % CROPS]
        tensors = [
            {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}
            for name, shape, datatype, size in (("pixels", crop.shape, "UINT8", crop.nbytes), ("number", (), "INT64", 8))
        ]
        parameters = {} if deadline is None else {"deadline_ms": 1e3 * deadline}
        head = json.dumps({"id": str(number), "inputs": tensors, "parameters": parameters}).encode()
        body = head + crop.tobytes() + np.int64(number).tobytes()
        async with self._session.post(self._url, data=body, headers={_LENGTH: str(len(head))}) as response:
            data = await response.read()
        if response.status != 200:
            return response.status, response.headers.get("Retry-After"), ("", [], [])
        found = json.loads(data)
        outputs = {output["name"]: output["data"] for output in found["outputs"]}
        return 200, None, (found["id"], outputs["checksum"], outputs["letters"])

    def _check(self, number: int, name: str, checksum: list[int], letters: list[int]) -> None:
        if name in self._answered:
            self.wrong["duplicated: an id that was answered before"] += 1
        self._answered.add(name)
        if name != str(number):
            self.wrong["mismatched: another request's id"] += 1
        if checksum != [self._sums[number % CROPS] + number]:
            self.wrong["mismatched: another request's checksum"] += 1
        if letters != self._letters[number % CROPS]:
            self.wrong["mismatched: other letters"] += 1


class GrpcAsker(Asker):
    """The same over gRPC.

    Args:
        address: the server's, host and port.
        file: the model.
    """

    def __init__(self, address: str, file: Path) -> None:
        super().__init__("", file)
        self._address = address
        self._model = file.stem

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._address)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def _send(self, number: int, deadline: float | None) -> tuple[int, str | None, tuple[str, list[int], list[int]]]:
        crop = self._crops[number % CROPS]
        request = messages["ModelInferRequest"](
            model_name=self._model,
            id=str(number),
            inputs=[
                {"name": "pixels", "shape": crop.shape, "datatype": "UINT8"},
                {"name": "number", "datatype": "INT64"},
            ],
            raw_input_contents=[crop.tobytes(), np.int64(number).tobytes()],
        )
        if deadline is not None:
            request.parameters["deadline_ms"].double_param = 1e3 * deadline
        infer = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        call = infer(request.SerializeToString(), timeout=PATIENCE)
        try:
            answer = messages["ModelInferResponse"].FromString(await call)
        except grpc.aio.AioRpcError as error:
            wait = dict(iter(error.trailing_metadata())).get("grpc-retry-pushback-ms")
            return _STATUS.get(error.code(), 500), wait and str(int(wait) // 1000), ("", [], [])
        raw = zip(answer.outputs, answer.raw_output_contents, strict=True)
        outputs = {output.name: np.frombuffer(data, np.int64).tolist() for output, data in raw}
        return 200, None, (answer.id, outputs["checksum"], outputs["letters"])
