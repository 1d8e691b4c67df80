{{/* Fields that all pods of jobs have: (dict "root" $ "component" "rotate" "token" true "account" "-rotate"). */}}
{{- define "progressdb-kms.jobPod" -}}
{{- include "progressdb-kms.pullSecrets" .root }}
serviceAccountName: {{ include "progressdb-kms.fullname" .root }}{{ .account }}
automountServiceAccountToken: {{ .token }}
enableServiceLinks: false
restartPolicy: {{ default "Never" .restart }}
securityContext:
  {{- include "progressdb-kms.podSecurity" (dict "numbers" .root.Values.podSecurityContext) | nindent 2 }}
{{- with .root.Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "progressdb-kms.jobMetadata" -}}
labels:
  {{- include "progressdb-kms.podLabels" (dict "root" .root "component" .component "podLabels" .root.Values.jobs.podLabels) | trim | nindent 2 }}
{{- with .root.Values.jobs.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The one container of a job: (dict "root" $ "name" "rotate" "args" (list ...) "env" (list ...) "mounts" (list ...)). */}}
{{- define "progressdb-kms.jobContainer" -}}
- name: {{ .name }}
  {{- include "progressdb-kms.ownImage" .root | nindent 2 }}
  args: {{ toJson .args }}
  {{- with concat (default list .env) .root.Values.jobs.extraEnv }}
  env:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .envFrom }}
  envFrom:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  terminationMessagePolicy: FallbackToLogsOnError
  resources:
    {{- toYaml (default .root.Values.jobs.resources .resources) | nindent 4 }}
  securityContext:
    {{- include "progressdb-kms.containerSecurity" .root | nindent 4 }}
  volumeMounts:
    {{- include "progressdb-kms.filesMount" .root | nindent 4 }}
    {{- with concat (default list .mounts) .root.Values.jobs.extraVolumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* Who an Event speaks of: the pod itself, whose name only the cluster knows. */}}
{{- define "progressdb-kms.podIdentity" -}}
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
- {name: POD_UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
{{- end }}

{{/* Binds the Role of an account to it: (dict "root" $ "name" "-rotate" "component" "rotate" "namespace" "x"). */}}
{{- define "progressdb-kms.roleBinding" -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  {{- include "progressdb-kms.metadata" (dict "root" .root "name" .name "component" .component "namespace" .namespace) | nindent 2 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: {{ include "progressdb-kms.fullname" .root }}{{ .name }}}
subjects:
  - {kind: ServiceAccount, name: {{ include "progressdb-kms.fullname" .root }}{{ default .name .account }}, namespace: {{ .root.Release.Namespace }}}
{{- end }}
