"""Every use of a name that Ray, TensorFlow or Keras keeps private, in one place: what to look at on a version change.

Each function names what it relies on, by file and line of Ray 2.60.0 (in the folder ``ray``), TensorFlow 2.21.0 or
tf_keras 2.21.0 (in the folder ``tf_keras/src``), and the test that fails first where that has changed.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.train import TrainingFailedError


def find_running_cluster() -> str | None:
    """Return the address of the cluster that ``ray start`` started last on this machine, or None."""
    # _private/services.py, line 407: find_bootstrap_address.
    # test_address.py: test_auto_is_what_was_started_here_for_anybody_and_no_other_job_s_cluster
    from ray._private import services

    address: str | None = services.find_bootstrap_address(None)
    return address


def replace_local_name(address: str) -> str:
    """Replace a name of this machine in an address by the one that the nodes of a cluster know, as `ray.init` does."""
    # _private/services.py, line 686: canonicalize_bootstrap_address.
    # test_submit.py: test_the_command_as_typed_trains_in_the_checkout_of_the_head_until_it_is_stopped
    from ray._private import services

    known: str = services.canonicalize_bootstrap_address(address)
    return known


def find_local_nodes() -> list[str]:
    """Return the hexadecimal ids of the nodes, of any cluster, that run on this machine."""
    # _private/services.py, line 374: find_node_ids.
    # test_address.py: test_a_cluster_without_a_node_on_this_machine_is_sent_jobs
    from ray._private import services

    return list(services.find_node_ids())


def use_token_if_available() -> None:
    """Turn on authentication by token where this user has a token and has not chosen a mode."""
    # _private/authentication/authentication_token_setup.py, line 92; `ray.init` calls it for the address "auto" alone.
    # test_submit.py: test_the_command_as_typed_trains_in_the_checkout_of_the_head_until_it_is_stopped
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def forget_token() -> None:
    """Make Ray read the token again, from the place that RAY_AUTH_TOKEN_PATH names now."""
    # _raylet.pyx: AuthenticationTokenLoader, as _private/authentication/authentication_token_setup.py, line 21, has it.
    # Any test of tests/integration/test_train.py.
    from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader

    AuthenticationTokenLoader.instance().reset_cache()


def reload_configuration() -> None:
    """Make Ray read its configuration again, RAY_AUTH_MODE included."""
    # _raylet.pyx: Config, as _private/authentication/authentication_token_setup.py, line 22, has it.
    # Any test of tests/integration/test_train.py.
    from ray._private.authentication.authentication_token_setup import Config

    Config.initialize("")


@contextlib.contextmanager
def keep_signal_actions() -> Iterator[None]:
    """Keep Ray's C++ code from taking signals for itself where it starts in this context, and from freeing them later.

    It would take SIGTERM among others, to write a stack and end the process, for a second in which no code of Python
    runs, and its end would set the default actions. It does so unless it finds that it has done so before.
    """
    # _raylet.so: ray::RayLog::is_failure_signal_handler_installed_, a bool.
    # test_signals.py: test_no_signal_is_ray_s_own
    from ray import _raylet

    symbol = "_ZN3ray6RayLog36is_failure_signal_handler_installed_E"
    are_taken = ctypes.c_bool.in_dll(ctypes.CDLL(_raylet.__file__), symbol)
    are_taken.value = True
    try:
        yield
    finally:
        are_taken.value = False


class Head:
    """The head of a cluster, to ask without connecting to the cluster; the methods raise `grpc.RpcError`."""

    # core/generated: NodeInfoGcsServiceStub and the messages of its methods, made from protobuf/gcs_service.proto.
    # test_address.py: test_another_version_is_named_with_this_one

    def __init__(self, channel: Any) -> None:
        from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

        self._stub = NodeInfoGcsServiceStub(channel)

    def read_version(self, timeout_seconds: float) -> str:
        """Return the version of Ray that runs there."""
        from ray.core.generated.gcs_service_pb2 import CheckAliveRequest

        version: str = self._stub.CheckAlive(CheckAliveRequest(), timeout=timeout_seconds).ray_version
        return version

    def has_living_node(self, node_ids: Sequence[str], timeout_seconds: float) -> bool:
        """Return whether one of these nodes is alive and part of the cluster."""
        from ray.core.generated.gcs_pb2 import GcsNodeInfo
        from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest

        if not node_ids:
            return False  # with no selector all nodes would be found
        selectors = [GetAllNodeInfoRequest.NodeSelector(node_id=bytes.fromhex(node_id)) for node_id in node_ids]
        request = GetAllNodeInfoRequest(node_selectors=selectors, state_filter=GcsNodeInfo.ALIVE, limit=1)
        return bool(self._stub.GetAllNodeInfo(request, timeout=timeout_seconds).node_info_list)


@contextlib.contextmanager
def open_head(address: str) -> Iterator[Head]:
    """Open a channel to the head of a cluster, with the token and the certificates that Ray itself would use."""
    # _private/grpc_utils.py, line 13: init_grpc_channel.
    # test_address.py: test_a_missing_token_is_asked_for
    from ray._private.grpc_utils import init_grpc_channel

    # Ray's own connections ignore the proxies of http_proxy, too.
    with init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        yield Head(channel)


def count_cores() -> int:
    """Return the number of cores of this machine or container, rounded down: 0 for a container with half a core."""
    # _private/utils.py, line 432: get_num_cpus.
    # test_local_worker.py: test_a_killed_worker_is_started_again_and_after_its_driver_the_same_command_goes_on
    from ray._private.utils import get_num_cpus

    return int(get_num_cpus(override_docker_cpu_warning=True))


def measure_machine(num_cpus: int) -> Any:
    """Return what `ray.init` would say that this machine has: num_cpus, num_gpus, memory (bytes) and resources."""
    # _private/resource_and_label_spec.py, line 27: ResourceAndLabelSpec.
    # test_cluster.py: test_a_container_with_half_a_core_has_one
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    spec = ResourceAndLabelSpec(num_cpus=num_cpus)
    spec.resolve(is_head=True, node_ip_address="127.0.0.1")
    return spec


def total_memory() -> int:
    """Return the memory of this machine or container, in bytes."""
    # _common/utils.py, line 375: get_system_memory.
    # test_pulse.py: test_a_pulse_is_sent_at_once_and_again_and_says_what_this_process_uses
    from ray._common.utils import get_system_memory

    memory: int = get_system_memory()
    return memory


def used_memory() -> int:
    """Return the used memory of this machine or container without the cache of files, in bytes."""
    # _private/utils.py, line 653: get_used_memory.
    # test_pulse.py: test_a_pulse_is_sent_at_once_and_again_and_says_what_this_process_uses
    from ray._private.utils import get_used_memory

    memory: int = get_used_memory()
    return memory


def used_memory_of_group(stat: str, usage: str, inactive: str, active: str) -> int | None:
    """Return the used memory of a control group without the cache of files, in bytes, or None where it is not known.

    Args:
        stat: path of its file of statistics.
        usage: path of its file with the memory in use.
        inactive: key of the inactive part of the cache in ``stat``.
        active: key of the active part.
    """
    # _private/utils.py, line 504: get_cgroup_used_memory.
    # test_compat.py: test_the_memory_of_a_group_is_counted_without_the_cache_of_files
    from ray._private.utils import get_cgroup_used_memory

    memory: int | None = get_cgroup_used_memory(stat, usage, inactive, active)
    return memory


def choose_address() -> tuple[str, int]:
    """Return the address of this node and a free port, in a worker of Ray Train."""
    # train/_internal/utils.py, line 72: get_address_and_port.
    # test_train.py: test_two_workers_train_like_one
    from ray.train._internal.utils import get_address_and_port

    address: tuple[str, int] = get_address_and_port()
    return address


def cause_of_death(error: Exception) -> Exception | None:
    """Return why Ray Train found a worker dead; None for another error than this finding."""
    # train/v2/_internal/exceptions.py, line 33: WorkerHealthCheckFailedError.
    # test_failures.py: test_the_controller_sends_what_died_apart_from_what_failed
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    cause: Exception | None = error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else None
    return cause


def cause_of_failed_start(error: Exception) -> Exception | None:
    """Return why a worker died before Ray Train called the training function; None for another error."""
    # train/v2/_internal/exceptions.py, line 81: WorkerGroupStartupFailedError.
    # test_workers.py: test_a_worker_that_dies_at_its_start_is_reported_and_an_error_that_would_come_again_ends_all
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    failure = getattr(error, "controller_failure", None)
    return failure.__cause__ or failure if isinstance(failure, WorkerGroupStartupFailedError) else None


def watch_starts(on_failed_start: Callable[[Exception], None]) -> Any:
    """Return a callback for Ray Train's controller, which calls a function before it starts workers once more.

    Args:
        on_failed_start: called with the error that ended the start before.
    """
    # train/v2/_internal/execution/callback.py, line 116: ControllerCallback; controller/state.py, line 108.
    # test_workers.py: test_a_worker_that_dies_at_its_start_is_reported_and_an_error_that_would_come_again_ends_all
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2._internal.execution.controller.state import ReschedulingState

    class StartWatch(ControllerCallback):
        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            if isinstance(current_state, ReschedulingState):
                on_failed_start(current_state.training_failed_error)

    return StartWatch()


def error_of_function(error: Exception) -> Exception:
    """Return the error that a training function raised, which Ray Train may have wrapped with its traceback."""
    # train/v2/_internal/exceptions.py, line 158: UserExceptionWithTraceback._base_exc.
    # test_workers.py: test_an_error_that_would_come_again_ends_all_workers_at_once
    raised: Exception = getattr(error, "_base_exc", error)
    return raised


def found_no_room(error: "TrainingFailedError") -> bool:
    """Return whether Ray Train gave up because the workers never found a place."""
    # train/v2/_internal/exceptions.py, line 48: WorkerGroupStartupTimeoutError.
    # test_workers.py: test_workers_without_room_are_waited_for_and_not_for_ever
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)


@contextlib.contextmanager
def mute_worker_messages() -> Iterator[None]:
    """Keep Ray from printing in this process, during the context, a paragraph for each worker that dies."""
    # _private/worker.py, line 2311: _worker_logs_enabled; while it is False, the listener of the driver prints nothing.
    # test_compat.py: test_ray_prints_nothing_about_workers_while_it_is_muted
    from ray._private import worker

    before = worker._worker_logs_enabled
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before


def set_heartbeat_timeout(num_workers: int, milliseconds: int) -> None:
    """Make TensorFlow's coordination service wait this long for a heartbeat of one of the workers.

    Must be called before the strategy is made; has no effect when one has been made already.
    """
    # tensorflow/python/eager/context.py, line 903: configure_coordination_service.
    # test_train.py: test_two_workers_train_like_one
    from tensorflow.compiler.xla.tsl.protobuf.coordination_config_pb2 import CoordinatedJob
    from tensorflow.python.eager import context

    if context.context().coordination_service is None:
        context.context().configure_coordination_service(
            service_type="standalone",
            service_leader="/job:worker/replica:0/task:0",
            coordinated_jobs=[CoordinatedJob(name="worker", num_tasks=num_workers)],
            heartbeat_timeout_in_ms=milliseconds,
        )


def memory_of_device(kind: str) -> int:
    """Return the most memory in bytes that TensorFlow takes of the first device of a kind, "GPU" or "CPU".

    It initializes TensorFlow, which a strategy of several workers must do first.

    Raises:
        RuntimeError: there is no such device.
    """
    # tensorflow/python/eager/context.py, line 667: _initialize_logical_devices; client/session.py, line 757.
    # test_compat.py: test_the_memory_of_a_device_is_what_tensorflow_may_take_of_it
    from tensorflow.python import pywrap_tfe
    from tensorflow.python.client import pywrap_tf_session
    from tensorflow.python.eager import context

    context.context().ensure_initialized()
    devices = pywrap_tfe.TFE_ContextListDevices(context.context()._handle)
    try:
        # Those of this process come before those of other workers.
        for number in range(pywrap_tfe.TF_DeviceListCount(devices)):
            if pywrap_tfe.TF_DeviceListType(devices, number) == kind:
                return int(pywrap_tf_session.TF_DeviceListMemoryBytes(devices, number))
    finally:
        pywrap_tfe.TF_DeleteDeviceList(devices)
    raise RuntimeError(f"TensorFlow has no {kind}")


def replace_dropout(layer: Any, drop: Callable[..., Any]) -> None:
    """Make a Dropout layer call ``drop(inputs, rate, noise_shape=None)`` for its outputs in training."""
    # layers/regularization/dropout.py, line 116: call.
    # test_compat.py: test_a_dropout_layer_calls_what_replaces_it
    layer._random_generator.dropout = drop


def index_of(optimizer: Any, variable: Any) -> int:
    """Return the position of a weight among those that an optimizer was built for."""
    # optimizers/optimizer.py, line 432: _build_index_dict, and line 1232: _var_key.
    # test_optimizer.py: test_an_update_is_that_of_keras
    index: int = optimizer._index_dict[optimizer._var_key(variable)]
    return index


def moments_of(optimizer: Any, variable: Any) -> list[Any]:
    """Return what an optimizer keeps of one weight: of SGD its momentum, of Adam its momentum and its velocity.

    Args:
        optimizer: SGD with momentum, or Adam; built.
        variable: one of the weights that it was built for.
    """
    # optimizers/adam.py, line 146, and optimizers/sgd.py, line 146: build.
    # test_optimizer.py: test_an_update_is_that_of_keras
    kept = [optimizer.momentums] if hasattr(optimizer, "momentums") else [optimizer._momentums, optimizer._velocities]
    return [variables[index_of(optimizer, variable)] for variables in kept]


def loss_scale_variable(optimizer: Any) -> Any:
    """Return the variable that a LossScaleOptimizer keeps its scale in."""
    # mixed_precision/loss_scale_optimizer.py, line 666: LossScaleOptimizerV3._loss_scale.
    # test_compat.py: test_the_variable_of_the_loss_scale_is_the_loss_scale
    return optimizer._loss_scale.current_loss_scale


def number_functions_alike() -> None:
    """Let the next function that is traced have a number that does not depend on how many were traced before.

    TensorFlow numbers functions by a counter of the process, and XLA finds a program that it has kept by the name of
    its function. The counter is moved on to the next multiple of a number that no process reaches before it trains.
    """
    # tensorflow/python/framework/ops.py, line 207: uid.
    # test_compat.py: test_functions_have_numbers_that_do_not_depend_on_those_before
    from tensorflow.python.framework import ops

    while ops.uid() % 100_000:
        pass
