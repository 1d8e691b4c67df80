"""The bootstrap, the rotation, the backup and the renewal."""

from pathlib import Path

import pytest
import yaml

from progressdb_kms.domain.policy import parse_policy
from progressdb_kms.provision.config import parse_config
from progressdb_kms.settings import parse_settings
from tests.chart.rendering import FULLNAME, document, every_mode, mode, objects, one

MODES = pytest.mark.parametrize(
    "values", every_mode(), ids=["defaults", "certmanager", "clusterissuer", "existing", "openshift"]
)


def bootstrap(values=None):
    """Return the bootstrap Job."""
    [job] = [item for item in objects(values) if item["kind"] == "Job"]
    return job


@MODES
def test_the_bootstrap_is_one_ordinary_job(values):
    """One Job, no hook, that stays after it is done."""
    job = bootstrap(values)
    assert not [name for name in job["metadata"].get("annotations", {}) if name.startswith("helm.sh/hook")]
    assert "ttlSecondsAfterFinished" not in job["spec"]


@pytest.mark.parametrize(
    "values",
    [
        {"clients": [{"name": "a"}]},
        {"image": {"tag": "2"}},
        {"store": {"commandTimeout": 3}},
        {"redis": {"tls": {"mode": "certManager"}}},
        {"jobs": {"podLabels": {"a": "b"}}},
    ],
)
def test_the_bootstraps_name_changes_with_its_work(values):
    """A Job can't be changed: whatever changes its work or its pod gives it another name."""
    assert bootstrap(values)["metadata"]["name"] != bootstrap()["metadata"]["name"]


@pytest.mark.parametrize(
    "values",
    [
        {"replicaCount": 3},
        {"rotation": {"schedule": "0 1 * * *"}},
        {"redis": {"podAnnotations": {"a": "b"}}},
        {"policy": {"rules": [{"identities": ["cn:a"], "permissions": ["key:read"]}]}},
    ],
)
def test_the_bootstrap_is_not_repeated_needlessly(values):
    """What is none of its work starts no new bootstrap."""
    assert bootstrap(values) == bootstrap()


def test_the_bootstrap_mounts_no_secret():
    """Its pod mounts ConfigMaps only: one that mounted what it makes would wait for ever."""
    for volume in bootstrap()["spec"]["template"]["spec"]["volumes"]:
        assert not [source for source in volume.get("projected", {}).get("sources", []) if "secret" in source]
        assert "secret" not in volume


def test_the_bootstrap_is_the_backup_claims_first_consumer():
    """The claim is bound at the install, or `helm install --wait` would wait for the first backup."""
    claims = [v for v in bootstrap()["spec"]["template"]["spec"]["volumes"] if "persistentVolumeClaim" in v]
    assert [v["persistentVolumeClaim"]["claimName"] for v in claims] == [f"{FULLNAME}-backup"]
    claim = one("PersistentVolumeClaim", "-backup", objects())
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def _template(suffix, values=None):
    return one("Deployment" if not suffix else "StatefulSet", suffix, objects(values))["spec"]["template"]


@pytest.mark.parametrize(
    "values",
    [
        {"clients": [{"name": "a"}]},
        {"policy": {"rules": [{"identities": ["cn:a"], "permissions": ["key:read"]}]}},
        {"tls": {"generated": {"days": 40}}},
        {"rotation": {"schedule": "0 1 * * *"}},
        {"replicaCount": 5},
    ],
)
def test_what_is_reloaded_restarts_nothing(values):
    """Clients, policy, certificates and schedules leave the pods of the service and the store as they are."""
    assert _template("", values) == _template("")
    assert _template("-redis", values) == _template("-redis")


@pytest.mark.parametrize("values", [{"settings": {"cache": {"ttl": 1}}}, {"store": {"connectTimeout": 2}}])
def test_what_is_not_reloaded_restarts_the_service(values):
    """A setting that the service reads at its start replaces its pods, and not the store's."""
    assert _template("", values) != _template("")
    assert _template("-redis", values) == _template("-redis")


def test_a_setting_of_the_store_restarts_the_store_alone():
    """redis.conf is read at the store's start."""
    values = {"redis": {"maxmemory": "1gb"}}
    assert _template("-redis", values) != _template("-redis")
    assert _template("", values) == _template("")


def test_rollout_takes_no_instance_away():
    """No instance may be missing, there is time for the drain, and two are spread where that can be had."""
    deployment = one("Deployment", "", objects())["spec"]
    assert deployment["replicas"] == 2
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    pod = deployment["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 5 + 20 + 10
    assert {item["whenUnsatisfiable"] for item in pod["topologySpreadConstraints"]} == {"ScheduleAnyway"}
    assert one("PodDisruptionBudget", "", objects())["spec"]["maxUnavailable"] == 1


def test_autoscaling_takes_replicas_out_of_the_manifest():
    """With an autoscaler an upgrade must not set the number back."""
    rendered = objects(mode("certmanager"))
    assert "replicas" not in one("Deployment", "", rendered)["spec"]
    assert one("HorizontalPodAutoscaler", "", rendered)["spec"]["scaleTargetRef"]["name"] == FULLNAME


def test_the_rotation_goes_on_where_it_was():
    """Never two at once; a drained or stopped pod is no failure; exit 3 is not repeated."""
    cron = one("CronJob", "-rotate", objects())["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    assert cron["suspend"] is False
    job = cron["jobTemplate"]["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    rules = {rule["action"]: rule for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
    assert rules["Ignore"]["onExitCodes"]["values"] == [75]
    assert rules["FailJob"]["onExitCodes"]["values"] == [3]
    assert "completions" not in job


def test_parallel_workers_are_an_indexed_job():
    """More than one worker: completions and parallelism alike, told apart by their index."""
    job = one("CronJob", "-rotate", objects({"rotation": {"parallelism": 4}}))["spec"]["jobTemplate"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 4, 4)
    assert "--indexed" in job["template"]["spec"]["containers"][0]["args"]


def test_the_dry_run_never_starts_by_itself():
    """The CronJob with --dry-run is suspended whatever the values, and there to be copied."""
    cron = one("CronJob", "-rotate-dry-run", objects())["spec"]
    assert cron["suspend"] is True
    assert "--dry-run" in cron["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"]


def test_backups_to_a_claim_and_to_s3():
    """To a claim by --directory; to S3 by --s3, with credentials from a Secret and room to spool."""
    container = one("CronJob", "-backup", objects())["spec"]["jobTemplate"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    assert container["args"][:2] == ["backup", "create"]
    assert container["args"][-2:] == ["--directory", "/backups"]
    assert "--keep=14" in container["args"]
    pod = one("CronJob", "-backup", objects(mode("existing")))["spec"]["jobTemplate"]["spec"]["template"][
        "spec"
    ]
    container = pod["containers"][0]
    assert container["args"][-4:] == [
        "--s3",
        "s3://backups/kms",
        "--s3-endpoint",
        "https://minio.minio.svc:9000",
    ]
    assert {"name": "tmp", "emptyDir": {"sizeLimit": "2Gi"}} in pod["volumes"]
    assert {variable["name"] for variable in container["env"]} >= {
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_REGION",
        "POD_UID",
    }


@MODES
def test_the_policy_is_accepted_by_the_service(values):
    """The policy file is one that the service takes, with one rule a client and the test's."""
    rules = parse_policy(document(objects(values), "-policy", "policy.yaml")).rules
    clients = len(values.get("clients", [])) + len(values.get("policy", {}).get("rules", []))
    assert len(rules) == clients + (0 if values.get("tls", {}).get("mode") == "existingSecret" else 1)


def test_a_client_has_what_it_was_given():
    """A client's rule, certificate and Secret follow from its entry; what is left out has a default."""
    rendered = objects(
        {
            "clients": [
                {"name": "chat", "namespace": "chat", "threadPrefixes": ["room:"], "pinned": True},
                {
                    "name": "ops",
                    "identity": "spiffe://td/ns/ops/sa/a",
                    "permissions": ["key:read"],
                    "secretName": "mine",
                },
                {"name": "old", "identity": "cn:old server", "spkiSha256": ["a" * 64]},
                {"name": "guest", "identity": "dns:g-*.x", "certificate": False},
            ],
            "test": {"enabled": False},
        }
    )
    rules = document(rendered, "-policy", "policy.yaml")["rules"]
    usual = ["key:create", "key:encrypt", "key:decrypt"]
    assert rules == [
        {"identities": ["dns:chat.chat.svc"], "permissions": usual, "thread_prefixes": ["room:"]},
        {"identities": ["spiffe://td/ns/ops/sa/a"], "permissions": ["key:read"]},
        {"identities": ["cn:old server"], "permissions": usual, "spki_sha256": ["a" * 64]},
        {"identities": ["dns:g-*.x"], "permissions": usual},
    ]
    made = {
        item["secret"]: item
        for item in document(rendered, "-provision", "provision.yaml")["certificates"]["certificates"]
        if item["authority"] == "client"
    }
    assert set(made) == {f"{FULLNAME}-client-chat", "mine", f"{FULLNAME}-client-old"}
    chat = made[f"{FULLNAME}-client-chat"]
    assert (chat["namespace"], chat["dns"], chat["keep_key"], chat["trust"]) == (
        "chat",
        ["chat.chat.svc"],
        True,
        ["server"],
    )
    assert made["mine"]["uri"] == ["spiffe://td/ns/ops/sa/a"]
    assert made[f"{FULLNAME}-client-old"]["common_name"] == "old server"
    assert "dns" not in made[f"{FULLNAME}-client-old"]


def test_the_test_calls_over_mutual_tls():
    """`helm test` runs the round trip with a certificate of its own, in a pod without a token."""
    pod = one("Pod", "-test", objects())
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert pod["spec"]["containers"][0]["args"][:2] == [
        "roundtrip",
        f"--endpoint=https://{FULLNAME}.kms.svc:8443",
    ]
    assert pod["spec"]["volumes"][0]["secret"]["secretName"] == f"{FULLNAME}-test-client"
    values = {
        "tls": {"mode": "existingSecret", "existingSecret": {"server": "s", "clientCa": "c"}},
        "redis": {"tls": {"mode": "generated"}},
    }
    assert not [item for item in objects(values) if item["kind"] == "Pod"]


@pytest.mark.parametrize(
    "release", ["kms", "progressdb-kms", "a" * 53, "my-progressdb-kms-in-a-rather-long-release-name"]
)
def test_names_fit(release):
    """Names fit, however long the release's is: 52 characters for a CronJob, 63 for what becomes a label."""
    rendered = objects({"monitoring": {"serviceMonitor": {"enabled": True}}}, release=release)
    for item in rendered:
        limit = {"CronJob": 52, "StatefulSet": 52, "Service": 63, "Job": 63, "Pod": 63, "Deployment": 47}.get(
            item["kind"], 253
        )
        assert len(item["metadata"]["name"]) <= limit, item["metadata"]["name"]
    names = [(item["kind"], item["metadata"]["name"]) for item in rendered]
    assert len(names) == len(set(names))
    yaml.safe_dump(rendered)


@MODES
def test_the_bootstraps_file_is_accepted_by_provision(values):
    """provision.yaml and renew.yaml are what `progressdb-kms provision` takes."""
    rendered = objects(values)
    files = one("ConfigMap", "-provision", rendered)["data"]
    assert "provision.yaml" in files
    for name in files:
        assert parse_config(document(rendered, "-provision", name), Path("/")).namespace == "kms"


@MODES
def test_the_configuration_is_accepted_by_the_service(values):
    """config.yaml is what the service takes, and with a made KEK it ties the KEK to its store."""
    settings = parse_settings(document(objects(values), "-config", "config.yaml"), Path("/"))
    assert settings.tls is not None
    expected = None if "kek" in values and "storeIdKey" not in values["kek"] else "store-id"
    assert (settings.store.id_file and settings.store.id_file.name) == expected


def test_the_audit_key_is_made_by_the_bootstrap():
    """With audit.enabled alone, in a Secret that all who write records mount, and the renewal can't read."""
    rendered = objects({"audit": {"enabled": True}})
    secret = f"{FULLNAME}-audit"
    provision = parse_config(document(rendered, "-provision", "provision.yaml"), Path("/etc"))
    assert provision.audit is not None
    assert (provision.audit.secret, provision.audit.key) == (secret, "audit.yaml")
    text = yaml.dump(rendered)
    assert text.count(f"name: {secret}\n") == 4  # service, bootstrap's reader of the store, rotation, backup
    service = parse_settings(document(rendered, "-config", "config.yaml"), Path("/etc/progressdb-kms"))
    assert str(service.audit.key_file) == "/etc/progressdb-kms/audit/audit.yaml"
    [role] = [
        item for item in rendered if item["kind"] == "Role" and item["metadata"]["name"].endswith("-renew")
    ]
    assert secret not in yaml.dump(role)


def test_an_audit_key_of_ones_own_is_only_mounted():
    """With audit.secretName nothing is made; without either the log is not chained."""
    rendered = objects({"audit": {"enabled": True, "secretName": "mine"}})
    assert "audit" not in document(rendered, "-provision", "provision.yaml")
    assert rendered == objects({"audit": {"secretName": "mine"}})
    assert "key_file" not in document(objects(), "-config", "config.yaml")["audit"]
