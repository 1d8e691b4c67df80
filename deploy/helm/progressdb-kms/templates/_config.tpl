{{/* The service's configuration (docs/configuration.md), as a YAML document. */}}
{{- define "progressdb-kms.config" -}}
{{- $r := include "progressdb-kms.fullname" . -}}
{{- $dir := "/etc/progressdb-kms" -}}
{{- $files := include "progressdb-kms.storeFiles" . | fromYaml -}}
listen: {host: 0.0.0.0, port: 8443}
{{- if gt (int .Values.workers) 1 }}
workers: {{ int .Values.workers }}
{{- end }}
admin: {host: 0.0.0.0, port: 9090}
tls:
  cert: {{ $dir }}/tls/tls.crt
  key: {{ $dir }}/tls/tls.key
  client_ca: {{ $dir }}/client-ca/ca.crt
  {{- if .Values.tls.clientCrl.secretName }}
  client_crl: {{ $dir }}/client-ca/crl.pem
  require_current_crl: {{ .Values.tls.clientCrl.requireCurrent }}
  {{- end }}
policy: {{ $dir }}/policy.yaml
ui: {{ .Values.ui.enabled }}
kek:
  path: {{ $dir }}/kek/kek.yaml
  management: kubernetes
  {{- range $name := list "pkcs11" "vault" "aws" }}
  {{- with index $.Values.kek $name }}
  {{ $name }}: {{ toJson . }}
  {{- end }}
  {{- end }}
store:
  {{- if .Values.redis.enabled }}
  url: rediss://{{ $r }}-redis.{{ .Release.Namespace }}.svc:6379/0
  username: kms
  {{- else }}
  url: {{ .Values.externalStore.url | quote }}
  username: {{ .Values.externalStore.username | quote }}
  durability: {{ .Values.externalStore.durability }}
  attested_reason: {{ .Values.externalStore.attestedReason | quote }}
  min_replicas: {{ .Values.externalStore.minReplicas }}
  {{- end }}
  password_file: {{ $dir }}/store/password
  {{- if hasKey $files "ca.crt" }}
  tls:
    ca: {{ $dir }}/store/ca.crt
    {{- if hasKey $files "tls.crt" }}
    cert: {{ $dir }}/store/tls.crt
    key: {{ $dir }}/store/tls.key
    {{- end }}
  {{- end }}
  {{- if include "progressdb-kms.storeIdKey" . }}
  id_file: {{ $dir }}/kek/store-id
  {{- end }}
  connect_timeout: {{ .Values.store.connectTimeout }}
  command_timeout: {{ .Values.store.commandTimeout }}
rotation:
  distribute: {{ ternary "external" "patch" (eq .Values.kek.management "external") }}
  kubernetes: {namespace: {{ .Release.Namespace }}, secret: {{ include "progressdb-kms.kekSecret" . }}, key: {{ .Values.kek.key }}}
  wait: {{ .Values.rotation.wait }}
  batch: {{ .Values.rotation.batch }}
  max_rate: {{ int64 .Values.rotation.maxRate }}
  events: {{ .Values.rotation.events }}
{{- if .Values.escrow.recipients }}
escrow:
  recipients:
    {{- range $index, $_ := .Values.escrow.recipients }}
    - {{ $dir }}/escrow/{{ $index }}.pem
    {{- end }}
{{- else }}
escrow: none
{{- end }}
audit:
  {{- with include "progressdb-kms.auditSecret" . }}
  key_file: {{ $dir }}/audit/audit.yaml
  {{- end }}
  stream: {{ .Values.audit.stream }}
  stream_records: {{ int64 .Values.audit.streamRecords }}
  data_plane: {{ .Values.audit.dataPlane | quote }}
  data_plane_interval: {{ include "progressdb-kms.scalar" .Values.audit.dataPlaneInterval }}
{{- range $section := list "limits" "cache" "drain" "destruction" "log" }}
{{ $section }}:
  {{- range $key, $value := index $.Values.settings $section }}
  {{ snakecase $key }}: {{ include "progressdb-kms.scalar" $value }}
  {{- end }}
{{- end }}
{{- end }}

{{/* A number as digits: Helm hands large ones on as floats, which print as 1e+06. */}}
{{- define "progressdb-kms.scalar" -}}
{{- if kindIs "float64" . }}{{ if eq (float64 (int64 .)) . }}{{ int64 . }}{{ else }}{{ . }}{{ end }}{{ else }}{{ . }}{{ end -}}
{{- end }}

{{/* A client with what it left out filled in, as JSON: (dict "root" $ "client" {...}). */}}
{{- define "progressdb-kms.client" -}}
{{- $r := include "progressdb-kms.fullname" .root -}}
{{- $namespace := default .root.Release.Namespace .client.namespace -}}
{{- $defaults := dict
      "namespace" $namespace
      "identity" (printf "dns:%s.%s.svc" .client.name $namespace)
      "permissions" (list "key:create" "key:encrypt" "key:decrypt")
      "secretName" (printf "%s-client-%s" $r .client.name)
      "certificate" (ne .root.Values.tls.mode "existingSecret") -}}
{{- range $key, $value := .client }}
{{- if not (and (kindIs "string" $value) (eq $value "")) }}{{ $_ := set $defaults $key $value }}{{ end }}
{{- end }}
{{- toJson $defaults -}}
{{- end }}

{{/* All clients that get a certificate or a rule, the test's own among them, as a JSON object with the list `clients`. */}}
{{- define "progressdb-kms.clients" -}}
{{- $all := list -}}
{{- range .Values.clients }}
{{- $all = append $all (include "progressdb-kms.client" (dict "root" $ "client" .) | fromJson) }}
{{- end }}
{{- if and .Values.test.enabled (ne .Values.tls.mode "existingSecret") }}
{{- $r := include "progressdb-kms.fullname" . }}
{{- $test := dict "name" "test" "secretName" (printf "%s-test-client" $r) "threadPrefixes" (list "helm-test:") "identity" (printf "dns:%s-test.%s.svc" $r .Release.Namespace) }}
{{- $all = append $all (include "progressdb-kms.client" (dict "root" . "client" $test) | fromJson) }}
{{- end }}
{{- toJson (dict "clients" $all) -}}
{{- end }}

{{/* The policy file: one rule for each client, then the further rules. */}}
{{- define "progressdb-kms.policy" -}}
{{- $rules := list -}}
{{- range (include "progressdb-kms.clients" . | fromJson).clients }}
{{- $rule := dict "identities" (list .identity) "permissions" .permissions }}
{{- with .spkiSha256 }}{{ $_ := set $rule "spki_sha256" . }}{{ end }}
{{- with .threadPrefixes }}{{ $_ := set $rule "thread_prefixes" . }}{{ end }}
{{- $rules = append $rules $rule }}
{{- end }}
{{- $policy := dict "rules" (concat $rules .Values.policy.rules) -}}
{{- with .Values.policy.limits }}{{ $_ := set $policy "limits" . }}{{ end }}
{{- toYaml $policy -}}
{{- end }}
