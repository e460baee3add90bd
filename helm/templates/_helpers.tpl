{{- define "gpu-balancer.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- /* 52 characters leave room for the longest suffix in a name of 63. */ -}}
{{- define "gpu-balancer.fullname" -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- .Values.fullnameOverride | default $full | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- /* The labels that select: they never change in the life of a release. Takes (dict "root" $ "component" "…"). */ -}}
{{- define "gpu-balancer.selectorLabels" -}}
app.kubernetes.io/name: {{ include "gpu-balancer.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "gpu-balancer.labels" -}}
{{- $own := dict
  "helm.sh/chart" (printf "%s-%s" .root.Chart.Name (.root.Chart.Version | replace "+" "_"))
  "app.kubernetes.io/version" .root.Chart.AppVersion
  "app.kubernetes.io/part-of" "gpu-balancer"
  "app.kubernetes.io/managed-by" .root.Release.Service
-}}
{{- $selector := include "gpu-balancer.selectorLabels" . | fromYaml -}}
{{- toYaml (merge (dict) $selector $own .root.Values.commonLabels) -}}
{{- end -}}

{{- define "gpu-balancer.podLabels" -}}
{{- $selector := include "gpu-balancer.selectorLabels" . | fromYaml -}}
{{- toYaml (merge (dict) $selector .podLabels .root.Values.commonLabels) -}}
{{- end -}}

{{- define "gpu-balancer.serviceAccountName" -}}
{{- $account := .root.Values.balancer.serviceAccount -}}
{{- $fallback := include "gpu-balancer.fullname" .root -}}
{{- if eq .component "node-agent" -}}
{{- $account = .root.Values.agent.serviceAccount -}}
{{- $fallback = printf "%s-agent" $fallback -}}
{{- end -}}
{{- $account.name | default (ternary $fallback "default" $account.create) -}}
{{- end -}}

{{- define "gpu-balancer.image" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- /* The port of config.listen or config.ops_listen. Takes (dict "root" $ "setting" "listen"). */ -}}
{{- define "gpu-balancer.port" -}}
{{- $address := get .root.Values.config .setting | default "" | toString -}}
{{- if not (regexMatch "^.+:[0-9]+$" $address) -}}
{{- fail (printf "config.%s has to be HOST:PORT, as in 0.0.0.0:8080" .setting) -}}
{{- end -}}
{{- if regexMatch "^(127\\.|localhost:|\\[::1\\])" $address -}}
{{- fail (printf "config.%s is %s: nothing outside the pod, and no probe, reaches a loopback address" .setting $address) -}}
{{- end -}}
{{- regexFind "[0-9]+$" $address -}}
{{- end -}}

{{- /* Defaults are the program's own: what config leaves out is drained as the program does it. */ -}}
{{- define "gpu-balancer.terminationGracePeriodSeconds" -}}
{{- $timeouts := get .Values.config "timeouts" | default dict -}}
{{- $grace := $timeouts.drain_grace_s | default 0 -}}
{{- $drain := ternary 30 $timeouts.drain_s (kindIs "invalid" $timeouts.drain_s) -}}
{{- addf $grace $drain 10 | ceil | int -}}
{{- end -}}

{{- /* Stops at anything in a ConfigMap-to-be that looks like a secret. The message names the path, never the value. */ -}}
{{- define "gpu-balancer.refuseSecrets" -}}
{{- $path := .path -}}
{{- if kindIs "map" .value -}}
{{- range $name, $value := .value -}}
{{- $below := printf "%s.%s" $path $name -}}
{{- if and $value (kindIs "string" $value) (regexMatch "(?i)(^|_)(password|passwd|secret|token|api_?key|admin_key|access_key|private_key)$|^key$" $name) -}}
{{- fail (printf "%s is a secret, and config ends in a ConfigMap: put it in a Secret and name that under secrets (see values.yaml)" $below) -}}
{{- end -}}
{{- include "gpu-balancer.refuseSecrets" (dict "path" $below "value" $value) -}}
{{- end -}}
{{- else if kindIs "slice" .value -}}
{{- range $index, $value := .value -}}
{{- include "gpu-balancer.refuseSecrets" (dict "path" (printf "%s[%d]" $path $index) "value" $value) -}}
{{- end -}}
{{- else if kindIs "string" .value -}}
{{- /* redis.url is judged more strictly: an unescaped slash in its password must not hide it */ -}}
{{- $inUrl := ternary "://[^@]*:[^@]*@" "://[^/?#\\s]*:[^/?#\\s]*@" (eq $path "config.redis.url") -}}
{{- if or (regexMatch $inUrl .value) (regexMatch "(?i)[?&](password|token|api_?key)=." .value) -}}
{{- fail (printf "%s contains a password, and config ends in a ConfigMap: put it in a Secret and name that under secrets (for redis.url: secrets.redisUrl)" $path) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /*
One row for each secret that is used: the file it becomes, and the variable that tells the balancer of the file. Those of
list items have none, since a variable cannot name an item: there the path stands in the settings file.
*/ -}}
{{- define "gpu-balancer.secretFiles" -}}
{{- $rows := list -}}
{{- range $row := list
  (list "redisUrl" "redis-url" "BALANCER_REDIS__URL_FILE" "redis" "url")
  (list "adminKeySha256" "admin-key-sha256" "BALANCER_OPS__ADMIN_KEY_SHA256_FILE" "ops" "admin_key_sha256")
  (list "agentTokenSha256" "agent-token-sha256" "BALANCER_OPS__AGENT_TOKEN_SHA256_FILE" "ops" "agent_token_sha256")
-}}
{{- $secret := get $.Values.secrets (index $row 0) | default dict -}}
{{- if $secret.name -}}
{{- $section := get $.Values.config (index $row 3) | default dict -}}
{{- if get $section (index $row 4) -}}
{{- fail (printf "config.%s.%s and secrets.%s are both set: keep one" (index $row 3) (index $row 4) (index $row 0)) -}}
{{- end -}}
{{- $rows = append $rows (dict "name" $secret.name "key" $secret.key "file" (index $row 1) "env" (index $row 2)) -}}
{{- end -}}
{{- end -}}
{{- range $node, $secret := .Values.secrets.nodeApiKeys -}}
{{- $rows = append $rows (dict "name" $secret.name "key" $secret.key "file" (printf "node-api-keys/%s" $node)) -}}
{{- end -}}
{{- range $tenant, $secret := .Values.secrets.tenantKeys -}}
{{- $rows = append $rows (dict "name" $secret.name "key" $secret.key "file" (printf "tenant-keys/%s" $tenant)) -}}
{{- end -}}
{{- toYaml $rows -}}
{{- end -}}

{{- /* The settings file: config as it stands, and the paths of the files that hold keys of nodes and tenants. */ -}}
{{- define "gpu-balancer.config" -}}
{{- include "gpu-balancer.refuseSecrets" (dict "path" "config" "value" .Values.config) -}}
{{- $config := deepCopy .Values.config -}}
{{- range $id, $secret := .Values.secrets.nodeApiKeys -}}
{{- $found := 0 -}}
{{- range $node := $config.nodes -}}
{{- if eq (toString $node.id) $id -}}
{{- $found = add1 $found -}}
{{- $_ := set $node "api_key_file" (printf "/etc/gpu-balancer/secrets/node-api-keys/%s" $id) -}}
{{- end -}}
{{- end -}}
{{- if not $found -}}
{{- fail (printf "secrets.nodeApiKeys names %s, and no node in config.nodes has that id" $id) -}}
{{- end -}}
{{- end -}}
{{- $auth := $config.auth | default dict -}}
{{- range $tenant, $secret := .Values.secrets.tenantKeys -}}
{{- $found := 0 -}}
{{- range $key := $auth.keys -}}
{{- if and (eq (toString $key.tenant) $tenant) (not $key.sha256) -}}
{{- $found = add1 $found -}}
{{- $_ := unset $key "sha256" -}}
{{- $_ := set $key "sha256_file" (printf "/etc/gpu-balancer/secrets/tenant-keys/%s" $tenant) -}}
{{- end -}}
{{- end -}}
{{- if ne (int $found) 1 -}}
{{- fail (printf "secrets.tenantKeys names %s: one entry of config.auth.keys has to be this tenant's without a sha256, and %d are" $tenant (int $found)) -}}
{{- end -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{- define "gpu-balancer.probe" -}}
httpGet: {path: {{ .path }}, port: {{ .port }}}
{{ toYaml .timing }}
{{- end -}}

{{- /* Engine SPEC of the agent's command line: URL[,id=NAME][,kind=NAME][,advertise=URL][,metrics=URL][,gpus=0+1] */ -}}
{{- define "gpu-balancer.engineSpec" -}}
{{- $parts := list .url -}}
{{- range $name := list "id" "kind" "advertise" "metrics" -}}
{{- with get $ $name -}}{{- $parts = append $parts (printf "%s=%s" $name .) -}}{{- end -}}
{{- end -}}
{{- with .gpus -}}{{- $parts = append $parts (printf "gpus=%s" (join "+" .)) -}}{{- end -}}
{{- join "," $parts -}}
{{- end -}}
