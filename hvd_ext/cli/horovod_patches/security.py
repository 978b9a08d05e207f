"""Edits that refuse every byte of a socket that does not prove that it comes from this job."""

from hvd_ext.cli.horovod_patches.kinds import Diff, Edit, Patch, WholeFile

# Remote code execution in every release up to 0.28.1, which these edits end.
ADVISORIES = ("CVE-2024-10190", "CVE-2026-31234")

_TOKEN = """\
      : rank_(rank) {
    // Without the token of this job the server refuses every request (see http_server.py).
    const char* token = std::getenv("_HOROVOD_RENDEZVOUS_TOKEN");
    url_prefix_ +=
        "http://" + server_ip + ":" + std::to_string(port) + "/" +
        (token != nullptr ? std::string(token) + "/" : "") + scope + "/";
"""

SECURITY_EDITS: tuple[Edit, ...] = (
    Patch(
        path="horovod/common/gloo/http_store.h",
        before="20c6f1e54ca9568c456427eea7229d4f46a749fa58f90671bb541930a4357227",
        after="68b19a67e8a306d2aafe5a3bed4b54ded73cfb812fb3700bb0f36d8bf0d4ef30",
        replacements=(
            ('#include "HTTPRequest.hpp"\n', '#include <cstdlib>\n\n#include "HTTPRequest.hpp"\n'),
            ("""\
      : rank_(rank) {
    url_prefix_ +=
        "http://" + server_ip + ":" + std::to_string(port) + "/" + scope + "/";
""", _TOKEN),
        ),
        why="Gloo's requests to the rendezvous server carry the job's token",
    ),
    WholeFile(
        "horovod/runner/common/util/guard.py",
        None,
        "limits for peers that have not authenticated",
    ),
    WholeFile(
        "horovod/runner/common/util/signed.py",
        None,
        "signatures of requests and responses",
    ),
    WholeFile(
        "horovod/runner/http/http_server.py",
        "f3d31823899951d3b97b5d4cc7ef47d5d81433db65f51a9c7bb0436e920f4272",
        "every request proves that it comes from this job (CVE-2024-10190, CVE-2026-31234)",
    ),
    WholeFile(
        "horovod/runner/http/http_client.py",
        "50dc543975a3df3af25a10e082d1c206969cf1ee9923c2b1936dc13ef7fef46e",
        "a value is unpickled once its signature is checked (CVE-2026-31234)",
    ),
    Diff(
        "horovod/runner/common/util/secret.py",
        "4312ce03443527010dd6bbcef3dd7909cbb37d1792cafff1c548c36f6f2dcd62",
        "9ce5ea7303ce28d8f93bad8308987ec0905ff13f3e88d8e42aefa74b241130bf",
        "the job's key in the environment, never on a command line",
    ),
    Diff(
        "horovod/runner/common/util/env.py",
        "24e9fb2edf5b54b60dee45904552fb72a494bca8ae45ab9b341a9e5526f919d2",
        "1f6e5997d32746b0c3c692cd132964083a97ca90f1a23bf56f5e53066b412be8",
        "a process's token is not exported on a command line",
    ),
    Diff(
        "horovod/runner/common/util/settings.py",
        "ed81381bce400fb2ad406c8df7846401adf146c4a6b750f631159797458f41b5",
        "06f3fbd9f305a978fc400a3ecb5b12d629e8a2deb34cf699f86f8e8d915772e6",
        "settings are pickled without the key",
    ),
    Diff(
        "horovod/runner/elastic/settings.py",
        "4bcf74b441cb3bad3d071edad7191467bbdd9ae0884f242c811596da00d0363a",
        "6d8c6278ad205053497c55a55638507c178027fe9759acf9bb259abd50ca1d91",
        "settings are pickled without the key",
    ),
    Diff(
        "horovod/runner/common/util/network.py",
        "b2bdf0324864d241f9bde0b8583acf2523f66f6c36c34f484009dd35a50ffc4a",
        "e8c84b57f9c0a0d650f3c4150c02754c41a3802c7c8d9a686bddad9cf7ab3795",
        "a service reads no more than 56 bytes of a peer without the key; nothing can be replayed",
    ),
    Diff(
        "horovod/runner/common/util/safe_shell_exec.py",
        "073780b3ea3abc24250cc72fe06d5537cecde2a70f2daca830387e7b360292d8",
        "1908dd6582810f7dd2fb683e157938ec4e198d15b874192a879d3129311d37b4",
        "a remote command reads the key from standard input",
    ),
    Diff(
        "horovod/runner/util/remote.py",
        "8551275a5fe4c569127b9e417845ebfdbc178c08ea2a2ef64cef167563c20b96",
        "cbebd817c68f09064aabee609d3c5b2d69d9671a1b91f658c69c7348c459492a",
        "a remote command reads the key from standard input",
    ),
    Diff(
        "horovod/runner/util/network.py",
        "a784c190bebda235788ddfa71f5f65feb4c1c0d5650b2255427a5734fb4bcb30",
        "dae50f53abe57d35677f30a73911f3b5d924ce0dae5d87608c461ecedd7bfc0c",
        "servers listen on the job's interface",
    ),
    Diff(
        "horovod/runner/driver/driver_service.py",
        "71f6086aaae9c8ddcb1fac72cdd641ff28d9520c0296ecc034c20d03c0cd5cdf",
        "f7029397da5125765737bf79d6d76d6df299f12448124efcb2ddb83a688edb89",
        "no key on the command line of task services",
    ),
    Diff(
        "horovod/runner/task_fn.py",
        "92f830897b7d7bd2175529536d569fc10b89c55c44a270ac20577adcdeb38aa5",
        "56c13f9351dcf19a7a6faba198d75b02f8ea668c71acca81fc51c85e648a85c6",
        "no key on the command line of task services",
    ),
    Diff(
        "horovod/runner/gloo_run.py",
        "d90c1a19f7972be22f343c65483da0b0abd21e1dba588c11715f664dd37a7784",
        "562911d4b7dcdb503e919d0d109e4167a78f58498f8cba7e067897c5bbb250c2",
        "workers get the key; servers listen on the job's interface",
    ),
    Diff(
        "horovod/runner/launch.py",
        "1722cbdcae4679207b55658bb9d92e7ee2861d5c1a81dafd674487d4232d53b5",
        "7b1ee5f6ff05eb2130e4f564950e4e8e2f9a31619607abd59818a9081987a290",
        "functions and results of horovod.run are signed (CVE-2026-31234)",
    ),
    Diff(
        "horovod/runner/elastic/rendezvous.py",
        "57eef5c34cac312bb50480293abda2dd3b8d4a2f8a3e216d97b07cf962b2fd86",
        "aa014205de1b18a70019881920f5522277a6dfb33619c11280b08e4ea48c95b7",
        "addresses of workers are JSON, from workers of this job only (CVE-2024-10190)",
    ),
    Diff(
        "horovod/runner/elastic/worker.py",
        "4207f8734733ee50b3fa0f673db6482e4d990701ec3ab5b03385110f48988b04",
        "07a0194f5028a2877bc04e960e2917b79c4ab9589f4681f544ba9602a34e73a3",
        "addresses of workers are JSON, from workers of this job only (CVE-2024-10190)",
    ),
    Diff(
        "horovod/common/basics.py",
        "7c66c7556e59c9637f627f3c468e3a54c93389bb8c643049a74ace419f9d1a00",
        "be4d012546ff46a2167f5c984da170e1c7a4a0e82a6219ab58000e186ab76ad5",
        "Gloo's requests to the rendezvous server carry the job's token",
    ),
    Diff(
        "horovod/spark/mpi_run.py",
        "3fdef133071f91eceff0f3ff5f1fb3cc3505aeb7c870b8ce1ecbc8b42d665ce8",
        "12450a021cd0d71eca1584dea3bc84f4a3d7be3e7ec8b0dd6a22254f5356455e",
        "one format of the key",
    ),
    Diff(
        "horovod/spark/gloo_run.py",
        "d8fd21f6c7f2fc25a3bc2d167ca402bdd04fa6a9bf9e3c36471705adfc2130ca",
        "0e92a47c71c4187854c50cdcb331b5be7d0c18e0ba63bd69204fbc529d61cc0d",
        "one key for the rendezvous server and its workers, and none on a command line",
    ),
    Diff(
        "horovod/spark/driver/mpirun_rsh.py",
        "80ce3eb8774a760d34ff2d0be4ad76a291d980c152ed92ec0723e055f07d0e82",
        "bae1a9a6b44d6998c8883f32a9ee693d27c0aad71521f31f0aa788fbc957be87",
        "one format of the key",
    ),
    Diff(
        "horovod/spark/driver/rendezvous.py",
        "a349cbf7f559264da90e30b6247cafc438c03f307ebd8eb7df8ab164bc875cfd",
        "50f32c382710b8615f9ff645c8cc3f16df95ab7bbd79fb9c0f6b82965c6e3e8f",
        "one key for the rendezvous server and its workers",
    ),
    Diff(
        "horovod/spark/task/__init__.py",
        "227594d4a175b3e9d73c9a686bf63151a7ef126ff15f26d7f0e013845f8dcd7c",
        "57d740265c5b9f5ce4d696f6e39d0b09a7af399e6ef29494021ee77848f74f85",
        "one format of the key",
    ),
    Diff(
        "horovod/spark/task/task_service.py",
        "131686ffab4c8ff1e32ff06013da160c5b90575a93ebc53dea4d20e6fc68c38f",
        "3c4d2a768b7af75653e8848670dca9998e7bbb82a5b83a4b0a395e49dd1f4b0f",
        "one format of the key",
    ),
    Diff(
        "horovod/ray/runner.py",
        "eb3e2698adcd9ddbc9b19b117f96c787b936868e1d9e84a19ca7ea0665a1786a",
        "f8007c62735ec985ac7f0f4c73c51dfe2829ec0205ffbfeab187174173a75ff2",
        "workers get the rendezvous server's key",
    ),
    Diff(
        "horovod/ray/elastic.py",
        "d8a55d7924852dd558fd3333cb292fe0359734f47cf010c2a5a5a9c2f70f3fc2",
        "d5f47ebbf68212643c11d78649614148926fed872f0f648f3724ddcc5691deee",
        "workers get the rendezvous server's key",
    ),
    Diff(
        "horovod/ray/elastic_v2.py",
        "fafc063c95870cec6348b94cb44d050be3ff1371253fe721a12d6a2fbf78c7f8",
        "14d6fd173938b4fbc1fa8a86408aa19520d37c617dd00aaf1ad22dddf4650f37",
        "workers get the rendezvous server's key",
    ),
    Diff(
        "horovod/ray/driver_service.py",
        "f33ee0f8491ba6466dbdb1fabc17ee617e7b51c4976a6f69dcd0e58199b31986",
        "9c6b161c72941c0b8db0bfde09d0fd601699f1745331ca80ca942e64ea4c5f54",
        "task services get the key that settings no longer carry",
    ),
)
