"""What the chart promises of security holds in every mode."""

import json
import re

import pytest

from tests.chart.rendering import (
    CHART,
    FULLNAME,
    NAMESPACE,
    ROOT,
    containers,
    document,
    every_mode,
    mode,
    objects,
    one,
    pod_templates,
    template,
)

MODES = pytest.mark.parametrize(
    "values", every_mode(), ids=["defaults", "certmanager", "clusterissuer", "existing", "openshift"]
)


@MODES
def test_every_container_is_restricted(values):
    """The restricted Pod Security Standard, and a read-only root, for each container."""
    rendered = objects(values)
    for name, container in containers(rendered):
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False, name
        assert security["capabilities"] == {"drop": ["ALL"]}, name
        assert security["readOnlyRootFilesystem"] is True, name
        assert security["privileged"] is False, name
    for name, pod in pod_templates(rendered).items():
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"]), name
        kinds = {kind for volume in pod["spec"]["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"projected", "secret", "configMap", "emptyDir", "persistentVolumeClaim"}, name


@MODES
def test_containers_have_requests_and_a_memory_limit_but_no_cpu_limit(values):
    """Requests for CPU and memory, a limit for memory, none for CPU."""
    for name, container in containers(objects(values)):
        resources = container["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"]), name
        assert "memory" in resources["limits"], name
        assert "cpu" not in resources["limits"], name


@MODES
def test_user_ids_are_numbers_or_left_to_the_cluster(values):
    """Numeric ids by default; null leaves the fields out altogether."""
    for name, pod in pod_templates(objects(values)).items():
        security = pod["spec"]["securityContext"]
        expected = 999 if "StatefulSet" in name else 65532
        if "podSecurityContext" in values:
            assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(security), name
        else:
            assert {security[key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {expected}, name


@MODES
def test_secrets_are_mounted_for_the_group_alone(values):
    """Files of Secrets have mode 0440, and no Secret is an environment variable but the S3 credentials."""
    rendered = objects(values)
    for name, pod in pod_templates(rendered).items():
        for volume in pod["spec"]["volumes"]:
            source = volume.get("projected") or volume.get("secret")
            if source:
                assert source["defaultMode"] == 0o440, name
    for name, container in containers(rendered):
        assert not [m for m in container["volumeMounts"] if "subPath" in m], name
        secret = {
            variable["name"]
            for variable in container.get("env", [])
            if "secretKeyRef" in variable.get("valueFrom", {})
        }
        assert secret <= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}, name


@MODES
def test_client_certificates_are_always_asked_for(values):
    """Each mode has a client CA, mounted from a bundle of trust that holds no leaf and no key."""
    rendered = objects(values)
    config = document(rendered, "-config", "config.yaml")
    assert config["tls"]["client_ca"] == "/etc/progressdb-kms/client-ca/ca.crt"
    assert set(config["listen"]) == {"host", "port"}
    sources = one("Deployment", "", rendered)["spec"]["template"]["spec"]["volumes"][0]["projected"][
        "sources"
    ]
    trust = [
        source["secret"]
        for source in sources
        if "secret" in source and source["secret"]["items"][0]["path"] == "client-ca/ca.crt"
    ]
    assert len(trust) == 1
    assert len(trust[0]["items"]) == 1
    leaves = {item["spec"]["secretName"] for item in rendered if item["kind"] == "Certificate"}
    assert trust[0]["name"] not in leaves


def test_the_clients_ca_signs_nothing_else():
    """Clients, the server and the store have three CAs, and the bundle of trust names the clients' alone."""
    certificates = document(objects(), "-provision", "provision.yaml")["certificates"]
    assert {item["name"] for item in certificates["authorities"]} == {"server", "client", "redis"}
    bundles = {item["secret"]: item["authorities"] for item in certificates["bundles"]}
    assert bundles == {f"{FULLNAME}-client-ca-bundle": ["client"], f"{FULLNAME}-redis-ca-bundle": ["redis"]}
    for item in certificates["certificates"]:
        if item["authority"] == "client":
            assert item["usage"] == "client"


def test_certmanager_has_a_ca_for_each_purpose():
    """A client's certificate comes from the clients' CA alone, and a pinned client keeps its key."""
    rendered = objects(mode("certmanager"))
    issuers = {item["metadata"]["name"] for item in rendered if item["kind"] == "Issuer"}
    assert issuers == {f"{FULLNAME}-{name}" for name in ("selfsigned", "server-ca", "client-ca", "redis-ca")}
    for item in rendered:
        if item["kind"] == "Certificate" and "-issued-" in item["metadata"]["name"]:
            assert item["spec"]["issuerRef"]["name"] == f"{FULLNAME}-client-ca"
            assert item["spec"]["usages"] == ["digital signature", "client auth"]
            pinned = item["metadata"]["name"].endswith("-chat-chat")
            assert item["spec"]["privateKey"]["rotationPolicy"] == ("Never" if pinned else "Always")


def test_clusterissuer_issues_in_the_clients_namespace():
    """With a ClusterIssuer the Certificate lies in its client's own namespace, and nothing is copied."""
    rendered = objects(mode("clusterissuer"))
    found = [
        item
        for item in rendered
        if item["kind"] == "Certificate" and item["spec"]["secretName"].endswith("-client-chat")
    ]
    assert [item["metadata"]["namespace"] for item in found] == ["chat"]
    assert "copies" not in document(rendered, "-provision", "provision.yaml").get("certificates", {})


def _roles(rendered):
    return {
        (item["metadata"]["namespace"], item["metadata"]["name"]): item["rules"]
        for item in rendered
        if item["kind"] == "Role"
    }


def test_the_service_has_no_rights():
    """The service's and the store's accounts have no Role, and their pods mount no token."""
    rendered = objects()
    bound = {
        subject["name"] for item in rendered if item["kind"] == "RoleBinding" for subject in item["subjects"]
    }
    assert not bound & {FULLNAME, f"{FULLNAME}-redis"}
    for name, pod in pod_templates(rendered).items():
        expected = pod["spec"]["serviceAccountName"] in bound
        assert pod["spec"]["automountServiceAccountToken"] is expected, name
    assert not [item for item in rendered if item["kind"].startswith("ClusterRole")]


def test_the_rotation_may_touch_one_secret():
    """The rotation job gets and patches the KEK's Secret by name and creates Events; nothing more."""
    assert _roles(objects())[NAMESPACE, f"{FULLNAME}-rotate"] == [
        {
            "apiGroups": [""],
            "resources": ["secrets"],
            "resourceNames": [f"{FULLNAME}-kek"],
            "verbs": ["get", "patch"],
        },
        {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"]},
    ]


def test_an_external_kek_is_never_written():
    """With kek.management external the rotation has no right on any Secret, and distributes nothing."""
    values = {"kek": {"management": "external", "secretName": "mine"}}
    rendered = objects(values)
    assert _roles(rendered)[NAMESPACE, f"{FULLNAME}-rotate"] == [
        {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"]}
    ]
    assert document(rendered, "-config", "config.yaml")["rotation"]["distribute"] == "external"
    assert document(rendered, "-provision", "provision.yaml")["kek"]["management"] == "require"


def test_a_rotation_that_asks_kubernetes_nothing_has_no_token():
    """Without a Secret to patch and Events to write it has no Role, no token and no way to the API."""
    rendered = objects(
        {"kek": {"management": "external", "secretName": "mine"}, "rotation": {"events": False}}
    )
    assert (NAMESPACE, f"{FULLNAME}-rotate") not in _roles(rendered)
    pod = pod_templates(rendered)[f"CronJob {FULLNAME}-rotate"]
    assert pod["spec"]["automountServiceAccountToken"] is False
    egress = one("NetworkPolicy", "-rotate", rendered)["spec"]["egress"]
    assert {port["port"] for rule in egress for port in rule["ports"]} == {53, 6379}


def test_the_renewal_can_not_read_the_kek():
    """The renewal's account reaches neither the KEK nor the store's passwords."""
    named = {
        name
        for rule in _roles(objects())[NAMESPACE, f"{FULLNAME}-renew"]
        for name in rule.get("resourceNames", [])
    }
    assert f"{FULLNAME}-server-tls" in named
    assert not named & {f"{FULLNAME}-kek", f"{FULLNAME}-redis-auth"}
    assert set(document(objects(), "-provision", "renew.yaml")) == {"namespace", "labels", "certificates"}


def test_what_others_keep_is_only_read():
    """The bootstrap may only get a KEK of others, and the Secrets of cert-manager."""
    rules = _roles(objects(mode("existing")))[NAMESPACE, f"{FULLNAME}-provision"]
    assert [(rule["verbs"], rule["resourceNames"]) for rule in rules] == [(["get"], ["kek", "store"])]
    rules = _roles(objects(mode("certmanager")))[NAMESPACE, f"{FULLNAME}-provision"]
    read = {name for rule in rules if rule["verbs"] == ["get"] for name in rule["resourceNames"]}
    assert {f"{FULLNAME}-client-ca", f"{FULLNAME}-issued-chat-chat", f"{FULLNAME}-redis-client-tls"} <= read
    written = {name for rule in rules if "patch" in rule["verbs"] for name in rule["resourceNames"]}
    assert f"{FULLNAME}-kek" in written
    assert not read & written


def test_rights_in_a_clients_namespace_are_for_its_secret_alone():
    """Elsewhere the bootstrap and the renewal may create Secrets, and get and patch that one client's."""
    rendered = objects({"clients": [{"name": "chat", "namespace": "chat"}]})
    foreign = {name: rules for (namespace, name), rules in _roles(rendered).items() if namespace == "chat"}
    assert set(foreign) == {f"{FULLNAME}-provision-kms", f"{FULLNAME}-renew-kms"}
    for rules in foreign.values():
        assert [rule.get("resourceNames") for rule in rules] == [None, [f"{FULLNAME}-client-chat"]]
        assert [rule["verbs"] for rule in rules] == [["create"], ["get", "patch"]]


@MODES
def test_no_role_lists_or_deletes(values):
    """No job may list, watch, update or delete anything."""
    for name, rules in _roles(objects(values)).items():
        assert {verb for rule in rules for verb in rule["verbs"]} <= {"get", "create", "patch"}, name


@MODES
def test_the_chart_makes_no_secret(values):
    """No template holds a Secret: none could be made anew, or be read, with the release's record."""
    assert not [item for item in objects(values) if item["kind"] == "Secret"]


def test_secrets_of_jobs_carry_no_instance_label():
    """What the bootstrap makes has no instance label and, the KEK, the annotation that keeps it."""
    provision = document(objects(), "-provision", "provision.yaml")
    assert "app.kubernetes.io/instance" not in provision["labels"]
    assert provision["kek"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert "Prune=false" in provision["kek"]["annotations"]["argocd.argoproj.io/sync-options"]


def test_the_store_loses_nothing():
    """An fsync for each write, no eviction, no pause of fsync, no plain port, callers' certificates."""
    lines = one("ConfigMap", "-redis", objects())["data"]["redis.conf"].splitlines()
    assert {
        "port 0",
        "tls-port 6379",
        "tls-auth-clients yes",
        "appendonly yes",
        "appendfsync always",
        "no-appendfsync-on-rewrite no",
        "maxmemory-policy noeviction",
        "aclfile /etc/redis/auth/users.acl",
    } <= set(lines)
    claims = one("StatefulSet", "-redis", objects())["spec"]
    assert claims["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}


def test_claim_templates_carry_no_versions():
    """A claim's template, which may never change, has no label that an upgrade changes."""
    [claim] = one("StatefulSet", "-redis", objects())["spec"]["volumeClaimTemplates"]
    assert set(claim["metadata"]["labels"]) == {"app.kubernetes.io/name", "app.kubernetes.io/instance"}


def test_each_container_of_the_store_sees_its_own_password():
    """The store sees digests and the probe's password, the sidecar its own, neither the service's."""
    spec = one("StatefulSet", "-redis", objects())["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    keys = {name: {item["key"] for item in volumes[name]["secret"]["items"]} for name in ("auth", "reload")}
    assert keys == {"auth": {"users.acl", "probe"}, "reload": {"users.acl", "reload"}}
    mounts = {item["name"]: {mount["name"] for mount in item["volumeMounts"]} for item in spec["containers"]}
    assert "reload" not in mounts["redis"]
    assert not {"auth", "data"} & mounts["tls-reload"]


def test_acl_users_have_the_documented_commands():
    """The service's ACL user has exactly the commands of docs/redis-acl.md, the others next to none."""
    acl = document(objects(), "-provision", "provision.yaml")["passwords"]["acl"].splitlines()
    users = {line.split()[1]: line.split()[2:] for line in acl if line}
    text = (ROOT / "docs" / "redis-acl.md").read_text()
    documented = {
        word
        for line in text.splitlines()
        if line.startswith("SETUSER kms")
        for word in line.split()
        if word.startswith(("+", "-", "~"))
    }
    documented -= {"-@all +sentinel|master"}
    # A Cluster's commands are for an external store.
    cluster = {"+asking", "+cluster|info", "+cluster|slots"}
    granted = {word for word in users["kms"] if word.startswith(("+", "-", "~"))}
    assert granted == documented - cluster
    assert users["default"] == ["off", "resetpass", "~*", "&*", "+@all"]
    assert set(users["reload"]) >= {"resetkeys", "-@all", "+config|set", "+acl|load", "+ping"}
    assert users["probe"] == ["on", "#{probe}", "resetkeys", "resetchannels", "-@all", "+ping"]


def test_images_may_be_named_by_digest():
    """A digest counts, whatever the tag."""
    digest = f"sha256:{'a' * 64}"
    rendered = objects({"image": {"digest": digest}, "redis": {"image": {"digest": digest}}})
    assert {container["image"] for _, container in containers(rendered)} == {
        f"progressdb-kms@{digest}",
        f"valkey/valkey@{digest}",
    }


def test_no_value_reaches_the_configuration_but_those_named():
    """Environment, volumes and labels of the user's leave the configuration as it is."""
    plain = document(objects(), "-config", "config.yaml")
    more = {"extraEnv": [{"name": "A", "value": "b"}], "podLabels": {"a": "b"}, "commonLabels": {"c": "d"}}
    assert document(objects(more), "-config", "config.yaml") == plain
    assert json.dumps(plain).count("client_ca") == 1


@MODES
def test_the_same_bytes_twice(values):
    """An upgrade renders what the install did, and rendering again gives the same bytes."""
    first = template(values)
    assert template(values, "--is-upgrade") == first
    assert template(values, "--include-crds") == first  # another process, since these arguments are new


def test_templates_ask_nobody():
    """No template takes anything from chance, a clock or the cluster."""
    forbidden = re.compile(
        r"\b(rand\w+|gen\w+|lookup|now|date\w*|uuidv4|derivePassword|bcrypt|htpasswd|getHostByName)\b"
    )
    for path in (CHART / "templates").rglob("*"):
        if path.is_file():
            for action in re.findall(r"\{\{.*?\}\}", path.read_text(), re.DOTALL):
                code = re.sub(r"/\*.*?\*/|\"[^\"]*\"|[$.][\w.]+", "", action, flags=re.DOTALL)
                assert not forbidden.search(code), f"{path.name}: {action}"
