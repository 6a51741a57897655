-- Rewrites every error response as {"error": {"message", "type", "param", "code"}}, with Retry-After where the status has
-- RetryInfo. Its input is the google.rpc.Status as JSON from the transcoder. Envoy's own replies are formatted by
-- local_reply_config. Errors inside a stream are mapped in the same way by tandem_frontend/response/error_body.py.

local TYPES = {
  [400] = "invalid_request_error", [404] = "invalid_request_error", [405] = "invalid_request_error",
  [409] = "invalid_request_error", [413] = "invalid_request_error", [422] = "invalid_request_error",
  [401] = "authentication_error", [403] = "permission_error", [429] = "rate_limit_error",
  [408] = "timeout_error", [504] = "timeout_error", [499] = "api_error", [503] = "service_unavailable_error",
}
local FAILED_PRECONDITION, RESOURCE_EXHAUSTED = "9", "8"
local TOO_LARGE = '"REQUEST_TOO_LARGE"'
local ERROR_INFO = '"type.googleapis.com/google.rpc.ErrorInfo"'
local RETRY_INFO = '"type.googleapis.com/google.rpc.RetryInfo"'
local HIDDEN = { "grpc-status", "grpc-message", "grpc-status-details-bin", "grpc-accept-encoding", "grpc-encoding" }

-- A JSON parser: each function takes an offset and returns the value and the offset behind it. Strings, numbers and literals
-- stay as written, quotes included, so that text inside a string is never taken for structure, and nothing is unescaped.
local read_value

local function skip_space(text, at)
  return string.find(text, "[^ \t\r\n]", at) or #text + 1
end

local function read_string(text, at)
  local from = at + 1
  while true do
    local stop = assert(string.find(text, '["\\]', from), "unterminated string")
    if string.sub(text, stop, stop) == '"' then
      return string.sub(text, at, stop), stop + 1
    end
    from = stop + 2
  end
end

local function read_members(text, at, closing, read_member)
  local members = {}
  at = skip_space(text, at + 1)
  while string.sub(text, at, at) ~= closing do
    at = skip_space(text, read_member(text, at, members))
    local mark = string.sub(text, at, at)
    assert(mark == "," or mark == closing, "expected a comma or a closing bracket")
    if mark == "," then
      at = skip_space(text, at + 1)
    end
  end
  return members, at + 1
end

local function read_field(text, at, fields)
  local name, value
  name, at = read_string(text, at)
  at = skip_space(text, at)
  assert(string.sub(text, at, at) == ":", "expected a colon after a field name")
  value, at = read_value(text, skip_space(text, at + 1))
  fields[name] = value
  return at
end

local function read_item(text, at, items)
  local value
  value, at = read_value(text, at)
  items[#items + 1] = value
  return at
end

function read_value(text, at)
  local mark = string.sub(text, at, at)
  if mark == '"' then
    return read_string(text, at)
  elseif mark == "{" then
    return read_members(text, at, "}", read_field)
  elseif mark == "[" then
    return read_members(text, at, "]", read_item)
  end
  local first, last = string.find(text, "^[%w%.%+%-]+", at)
  assert(first, "expected a value")
  return string.sub(text, first, last), last + 1
end

-- Reason and field of a google.rpc.Status as JSON strings, and its retry delay in seconds. All may be nil.
local function details_of(status)
  local reason, field, delay_s
  for _, detail in ipairs(status['"details"'] or {}) do
    local kind = detail['"@type"']
    if kind == ERROR_INFO and detail['"domain"'] == '"tandem"' then
      reason = detail['"reason"']
      field = (detail['"metadata"'] or {})['"field"']
    elseif kind == RETRY_INFO then
      local written = detail['"retryDelay"'] or detail['"retry_delay"'] or ""
      delay_s = tonumber(string.match(written, '^"([%d%.]+)s"$'))
    end
  end
  return reason, field, delay_s
end

local function rewritten(handle, http_status, body)
  local understood, status = pcall(read_value, body, 1)
  if not understood or type(status) ~= "table" then
    status = {}
  end
  if status['"error"'] ~= nil then
    return nil
  end
  local reason, field, delay_s = details_of(status)
  -- Tandem uses FAILED_PRECONDITION for incompatible workers: the caller cannot fix it, so it is a 503 and not a 400.
  if status['"code"'] == FAILED_PRECONDITION then
    http_status = 503
    handle:headers():replace(":status", "503")
  end
  local is_too_large = reason == TOO_LARGE
    or (status['"code"'] == RESOURCE_EXHAUSTED and reason == nil
      and string.find(status['"message"'] or "", "message larger than max", 1, true) ~= nil)
  if is_too_large then
    http_status = 413
    handle:headers():replace(":status", "413")
  end
  if delay_s ~= nil then
    handle:headers():replace("retry-after", tostring(math.max(1, math.ceil(delay_s))))
  end
  if http_status == 503 then
    field = nil
  end
  return string.format(
    '{"error":{"message":%s,"type":"%s","param":%s,"code":%s}}',
    status['"message"'] or '""',
    TYPES[http_status] or (http_status < 500 and "invalid_request_error" or "server_error"),
    field or "null",
    reason and string.lower(reason) or "null"
  )
end

function envoy_on_response(handle)
  local headers = handle:headers()
  local content_type = headers:get("content-type") or ""
  if string.find(content_type, "application/grpc", 1, true) == 1 then
    return
  end
  for _, name in ipairs(HIDDEN) do
    headers:remove(name)
  end
  local http_status = tonumber(headers:get(":status"))
  if http_status < 400 then
    return
  end
  local buffer = handle:body(true)
  local replaced = rewritten(handle, http_status, buffer:getBytes(0, buffer:length()))
  if replaced ~= nil then
    local length = buffer:setBytes(replaced)
    -- headers() is called again: body() may have yielded until the body arrived, which invalidates the earlier object.
    handle:headers():replace("content-type", "application/json")
    handle:headers():replace("content-length", tostring(length))
  end
end
